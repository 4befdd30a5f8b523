"""The decision: which kernel runs a problem on a machine, why, and why not the others.

`decide` is a pure function of its arguments. `resolve` fills in what the user left out: the machine that is there, the
plugins installed, the demands in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from halfbyte.eligibility import refusals_for, required_version
from halfbyte.errors import NoKernelError
from halfbyte.machines import Machine
from halfbyte.policies import USER_ORIGINS, Policy, Rule, check_known
from halfbyte.problems import Problem
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity, KernelSpec, KnownBad, Proof, applies


class State(StrEnum):
    """What became of a candidate."""

    SELECTED = "selected"
    OUTRANKED = "outranked"  # could run
    BLOCKED = "blocked"  # could, but policy, known-bad or opt-in forbids; it carries that refusal
    INELIGIBLE = "ineligible"  # cannot run; it carries every refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One kernel and what became of it. `fidelity` is None where it does not compute the scheme."""

    spec: KernelSpec
    plugin: str
    state: State
    fidelity: Fidelity | None
    #: How far the kernel was proved on this kind of machine.
    proof: Proof
    priority: int
    #: Bytes that the weights take once they are prepared for this kernel.
    bytes: int
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """The answer: the chosen kernel (None: nothing can run), every candidate, and which setting decided."""

    problem: Problem
    machine: Machine
    selected: Candidate | None
    #: "argument require", "context manager prefer", "environment HALFBYTE_DENY", ..., or "priority".
    decided_by: str
    #: In the order of their rank: selected, outranked, blocked, ineligible.
    candidates: tuple[Candidate, ...]

    def require(self) -> Candidate:
        """Return the chosen candidate; NoKernelError with every refusal and what to do next if there is none."""
        if self.selected is None:
            raise NoKernelError(_failure(self))
        return self.selected


@dataclass(frozen=True, slots=True)
class _Demands:
    """The policies in force, highest first, and the question they are put to."""

    policies: Sequence[Policy]
    machine: Machine
    scheme: str

    def requiring(self) -> Policy | None:
        """The highest policy that requires something for the scheme: it replaces those below it."""
        return next((p for p in self.policies if p.rules("require", self.scheme)), None)

    def required(self, spec: KernelSpec) -> bool:
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


def resolve(problem: Problem, machine: Machine | None = None, policy: Policy | None = None) -> Resolution:
    """Choose the kernel for a problem: on this machine unless another is described, under `policy` and what is set.

    UsageError for an environment variable, kernel id or scheme that does not exist, with the nearest match.
    """
    from halfbyte.plugins import all_kernels, installed_plugins
    from halfbyte.policies import current_policies
    from halfbyte.probe import probe

    kernels = all_kernels(installed_plugins())
    return decide(problem, machine or probe(kernels=kernels), kernels, current_policies(policy))


def decide(
    problem: Problem, machine: Machine, kernels: Sequence[tuple[str, KernelSpec]], policies: Sequence[Policy] = ()
) -> Resolution:
    """Choose among (plugin name, kernel) under the policies, highest first. Pure: same inputs, same answer."""
    check_known(policies, (spec.id for _, spec in kernels))
    demands = _Demands(policies, machine, problem.scheme.name)
    judged = [_judge(plugin, spec, problem, demands) for plugin, spec in kernels if spec.op == problem.op]
    judged.sort(key=lambda one: one.rank)
    winner = next((one for one in judged if one.can_run), None)
    candidates = {id(one): one.candidate(problem, machine, chosen=one is winner) for one in judged}
    return Resolution(
        problem=problem,
        machine=machine,
        selected=None if winner is None else candidates[id(winner)],
        decided_by=_decided_by(winner, judged, demands),
        candidates=tuple(sorted(candidates.values(), key=lambda c: list(State).index(c.state))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """A kernel with everything that is held against it."""

    spec: KernelSpec
    plugin: str
    fidelity: Fidelity | None
    priority: int
    place: int
    refusals: list[Refusal]
    #: What forbids a kernel that could run, each with the policy that says so (None: nobody had to).
    blocks: list[tuple[Refusal, Policy | None]]

    @property
    def can_run(self) -> bool:
        return not self.refusals and not self.blocks

    @property
    def rank(self) -> tuple[int, int, str]:
        return self.place, -self.priority, self.spec.id

    def candidate(self, problem: Problem, machine: Machine, *, chosen: bool) -> Candidate:
        if self.refusals:
            state = State.INELIGIBLE
        elif self.blocks:
            state = State.BLOCKED
        else:
            state = State.SELECTED if chosen else State.OUTRANKED
        return Candidate(
            spec=self.spec,
            plugin=self.plugin,
            state=state,
            fidelity=self.fidelity,
            proof=self.spec.proof_for(machine),
            priority=self.priority,
            bytes=resident_bytes(self.spec, problem),
            refusals=tuple(self.refusals or [refusal for refusal, _ in self.blocks]),
        )


def resident_bytes(spec: KernelSpec, problem: Problem) -> int:
    """Bytes that the problem's weights take once they are padded and prepared for a kernel."""
    return spec.resident_bytes(problem.padded(spec.n_multiple, spec.k_multiple))


def _judge(plugin: str, spec: KernelSpec, problem: Problem, demands: _Demands) -> _Judged:
    refusals = refusals_for(spec, problem, demands.machine)
    fidelity = spec.schemes.get(demands.scheme)
    return _Judged(
        spec=spec,
        plugin=plugin,
        fidelity=fidelity,
        priority=spec.priority_for(demands.machine, demands.scheme),
        place=demands.preferred(spec)[0],
        refusals=refusals,
        blocks=[] if refusals or fidelity is None else _blocks(spec, fidelity, problem, demands),
    )


def _blocks(
    spec: KernelSpec, fidelity: Fidelity, problem: Problem, demands: _Demands
) -> list[tuple[Refusal, Policy | None]]:
    """Everything that forbids a kernel that could run."""
    return [
        *_blocked_by_name(spec, demands),
        *_blocked_by_fidelity(fidelity, demands),
        *_blocked_by_memory(spec, problem, demands),
    ]


def _blocked_by_name(spec: KernelSpec, demands: _Demands) -> list[tuple[Refusal, Policy | None]]:
    blocks: list[tuple[Refusal, Policy | None]] = []
    requiring, required = demands.requiring(), demands.required(spec)
    denying, preferring = demands.denying(spec), demands.preferred(spec)[1]
    if denying is not None:
        blocks.append((Refusal(Code.DENIED, f"denied by {denying.named('deny')}"), denying))
    if requiring is not None and not required:
        rules = ", ".join(str(rule) for rule in requiring.rules("require", demands.scheme))
        blocks.append((Refusal(Code.NOT_REQUIRED, f"{requiring.named('require')} says {rules}"), requiring))
    if not spec.auto and not required and preferring is None:
        hint = f"require or prefer it by name: HALFBYTE_PREFER={spec.id}"
        blocks.append((Refusal(Code.OPT_IN, "it is never chosen by itself", hint), None))
    if not required:
        blocks += [(_known_bad(bad), None) for bad in spec.known_bad if _is_bad(bad, demands)]
    return blocks


def _blocked_by_fidelity(fidelity: Fidelity, demands: _Demands) -> list[tuple[Refusal, Policy | None]]:
    blocks: list[tuple[Refusal, Policy | None]] = []
    worst = demands.setting("fidelity")
    if worst is not None and fidelity.rank > Fidelity(str(worst.fidelity)).rank:
        detail = f"it is {fidelity}; {worst.named('fidelity')} allows {worst.fidelity} at worst"
        blocks.append((Refusal(Code.FIDELITY, detail), worst))
    activations = demands.setting("activations")
    if fidelity is Fidelity.QUANTIZES_ACTIVATIONS and (
        activations is None or activations.activations != "allow-quantized"
    ):
        detail = "it quantizes activations that the checkpoint keeps in 16 or 32 bits"
        hint = "allow it with HALFBYTE_ACTIVATIONS=allow-quantized"
        blocks.append((Refusal(Code.ACTIVATIONS, detail, hint), activations))
    return blocks


def _blocked_by_memory(spec: KernelSpec, problem: Problem, demands: _Demands) -> list[tuple[Refusal, Policy | None]]:
    blocks: list[tuple[Refusal, Policy | None]] = []
    form = demands.setting("weights")
    if form is not None and form.weights not in ("auto", spec.keeps):
        blocks.append(
            (Refusal(Code.WEIGHTS, f"it keeps weights {spec.keeps}; {form.named('weights')} says {form.weights}"), form)
        )
    needed, there = resident_bytes(spec, problem), demands.machine.memory
    if there is not None and needed > there:
        blocks.append((Refusal(Code.MEMORY, f"its weights take {needed} bytes; {demands.machine} has {there}"), None))
    return blocks


def _is_bad(bad: KnownBad, demands: _Demands) -> bool:
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


def _decided_by(winner: _Judged | None, judged: Sequence[_Judged], demands: _Demands) -> str:
    requiring = demands.requiring()
    if requiring is not None:
        return requiring.named("require")
    preferring = None if winner is None else demands.preferred(winner.spec)[1]
    if preferring is not None:
        return preferring.named("prefer")
    for one in judged:
        if one is winner:
            break
        for refusal, policy in one.blocks:
            if policy is not None and policy.origin in USER_ORIGINS:
                return policy.named(refusal.code if refusal.code is not Code.DENIED else "deny")
    return "priority"


def _failure(resolution: Resolution) -> str:
    """What was asked, what was found, every candidate with its refusals, what to do next."""
    lines = [
        f"no kernel can run {resolution.problem}",
        f"on {resolution.machine} (decided by {resolution.decided_by}):",
        *(
            f"  {candidate.spec.id} [{candidate.plugin}] {candidate.state}: {'; '.join(map(str, candidate.refusals))}"
            for candidate in resolution.candidates
        ),
    ]
    hints = {refusal.hint for candidate in resolution.candidates for refusal in candidate.refusals if refusal.hint}
    lines.append(f"to go on: {'; or '.join(sorted(hints)) or 'run `halfbyte doctor` to see what is installed'}")
    return "\n".join(lines)
