"""What forbids a kernel that could run: the user's demands, opt-in, known faults, memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from halfbyte.eligibility import required_version
from halfbyte.machines import Machine
from halfbyte.policies import MEMORY, Policy, Rule
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity, KernelSpec, KnownBad, applies
from halfbyte.units import size_text

#: Why a kernel is blocked, and the policy that says so (None: nobody had to).
Block: TypeAlias = tuple[Refusal, Policy | None]


@dataclass(frozen=True, slots=True)
class Demands:
    """The policies in force, highest first, and the question they are put to."""

    policies: Sequence[Policy]
    machine: Machine
    scheme: str

    def requiring(self) -> Policy | None:
        """The highest policy that requires something for the scheme: it replaces those below it."""
        return next((p for p in self.policies if p.rules("require", self.scheme)), None)

    def required(self, spec: KernelSpec) -> bool:
        """Whether the kernel is one of those required."""
        policy = self.requiring()
        return policy is not None and _any(policy.rules("require", self.scheme), spec, self.scheme)

    def preferred(self, spec: KernelSpec) -> tuple[int, Policy | None]:
        """The place of the first prefer rule that names the kernel, counted through all policies."""
        place = 0
        for policy in self.policies:
            for rule in policy.rules("prefer", self.scheme):
                if rule.matches(spec.id, self.scheme):
                    return place, policy
                place += 1
        return place, None

    def denying(self, spec: KernelSpec) -> Policy | None:
        """The policy that denies the kernel, unless a higher one requires it."""
        for policy in self.policies:
            if _any(policy.rules("deny", self.scheme), spec, self.scheme):
                return policy
            if policy is self.requiring() and self.required(spec):
                return None
        return None

    def setting(self, name: str) -> Policy | None:
        """The highest policy that says something about one of the single-valued demands."""
        return next((p for p in self.policies if getattr(p, name) is not None), None)


def blocks_of(spec: KernelSpec, fidelity: Fidelity, size: int, demands: Demands) -> list[Block]:
    """Everything that forbids a kernel that could run and takes `size` bytes; empty if it may."""
    return [
        *_by_name(spec, demands),
        *_by_fidelity(fidelity, demands),
        *_by_memory(spec, size, demands),
    ]


def _by_name(spec: KernelSpec, demands: Demands) -> Iterator[Block]:
    requiring, denying = demands.requiring(), demands.denying(spec)
    if denying is not None:
        yield Refusal(Code.DENIED, f"denied by {denying.named('deny')}"), denying
    if demands.required(spec):
        return
    if requiring is not None:
        rules = ", ".join(str(rule) for rule in requiring.rules("require", demands.scheme))
        yield Refusal(Code.NOT_REQUIRED, f"{requiring.named('require')} says {rules}"), requiring
    if not spec.auto and demands.preferred(spec)[1] is None:
        hint = f"require or prefer it by name: HALFBYTE_PREFER={spec.id}"
        yield Refusal(Code.OPT_IN, "it is never chosen by itself", hint), None
    for bad in spec.known_bad:
        if _is_bad(bad, demands):
            yield _known_bad(bad), None


def _by_fidelity(fidelity: Fidelity, demands: Demands) -> Iterator[Block]:
    worst, activations = demands.setting("fidelity"), demands.setting("activations")
    if worst is not None and fidelity.rank > Fidelity(str(worst.fidelity)).rank:
        detail = f"it is {fidelity}; {worst.named('fidelity')} allows {worst.fidelity} at worst"
        yield Refusal(Code.FIDELITY, detail), worst
    allowed = activations is not None and activations.activations == "allow-quantized"
    if fidelity is Fidelity.QUANTIZES_ACTIVATIONS and not allowed:
        detail = "it quantizes activations that the checkpoint keeps in 16 or 32 bits"
        yield Refusal(Code.ACTIVATIONS, detail, "allow it with HALFBYTE_ACTIVATIONS=allow-quantized"), activations


def _by_memory(spec: KernelSpec, size: int, demands: Demands) -> Iterator[Block]:
    form = demands.setting("weights")
    named = demands.required(spec) or demands.preferred(spec)[1] is not None
    if form is not None and form.weights not in ("auto", spec.keeps) and not (form.origin == MEMORY and named):
        detail = f"it keeps weights {spec.keeps}; {form.named('weights')} says {form.weights}"
        yield Refusal(Code.WEIGHTS, detail), form
    there = demands.machine.memory
    if there is not None and size > there:
        yield (
            Refusal(Code.MEMORY, f"its weights take {size_text(size)}; {demands.machine} has {size_text(there)}"),
            None,
        )


def _is_bad(bad: KnownBad, demands: Demands) -> bool:
    if not applies(bad, demands.machine, demands.scheme):
        return False
    if not bad.requires:
        return True
    # A described machine counts as having what works: the version in which the failure is mended, if there is one.
    return not bad.fixed_in if demands.machine.packages is None else required_version(demands.machine, bad.requires)[0]


def _known_bad(bad: KnownBad) -> Refusal:
    hint = f"upgrade to {bad.fixed_in}" if bad.fixed_in else "not mended yet; require it by name to run it all the same"
    return Refusal(Code.KNOWN_BAD, f"{bad.effect}, see {bad.thread}", hint)


def _any(rules: Sequence[Rule], spec: KernelSpec, scheme: str) -> bool:
    return any(rule.matches(spec.id, scheme) for rule in rules)
