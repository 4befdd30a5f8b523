"""The decision: which kernel runs a problem on a machine, why, and why not the others.

`decide` is a pure function of its arguments. `resolve` fills in what the user left out: the machine that is there, the
plugins installed, the demands in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from halfbyte.blocking import Block, Demands, blocks_of
from halfbyte.eligibility import refusals_for
from halfbyte.errors import NoKernelError
from halfbyte.machines import Machine
from halfbyte.plugins import available_kernels
from halfbyte.policies import Policy, check_known, current_policies
from halfbyte.probe import probe
from halfbyte.problems import Problem
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity, KernelSpec, Proof


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

    def chosen(self) -> Candidate:
        """Return the chosen candidate; NoKernelError with every refusal and what to do next if there is none."""
        if self.selected is None:
            raise NoKernelError(_failure(self))
        return self.selected


def resolve(problem: Problem, machine: Machine | None = None, policy: Policy | None = None) -> Resolution:
    """Choose the kernel for a problem: on this machine unless another is described, under `policy` and what is set.

    UsageError for an environment variable, kernel id or scheme that does not exist, with the nearest match.
    """
    return decide(problem, machine or machine_here(), available_kernels(), current_policies(policy))


def machine_here(device: str | None = None) -> Machine:
    """The machine around a device of this one, by default the best, with the libraries that kernels ask for."""
    return probe(device, available_kernels())


def decide(
    problem: Problem, machine: Machine, kernels: Sequence[tuple[str, KernelSpec]], policies: Sequence[Policy] = ()
) -> Resolution:
    """Choose among (plugin name, kernel) under the policies, highest first. Pure: same inputs, same answer."""
    check_known(policies, (spec.id for _, spec in kernels))
    demands = Demands(policies, machine, problem.scheme.name)
    judged = [_judge(plugin, spec, problem, demands) for plugin, spec in kernels if spec.op == problem.op]
    judged.sort(key=lambda one: one.rank)
    winner = next((one for one in judged if one.can_run), None)
    candidates = {id(one): one.candidate(machine, chosen=one is winner) for one in judged}
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
    bytes: int
    refusals: list[Refusal]
    #: What forbids it though it could run.
    blocks: list[Block]

    @property
    def can_run(self) -> bool:
        return not self.refusals and not self.blocks

    @property
    def rank(self) -> tuple[int, int, str]:
        return self.place, -self.priority, self.spec.id

    def candidate(self, machine: Machine, *, chosen: bool) -> Candidate:
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
            bytes=self.bytes,
            refusals=tuple(self.refusals or [refusal for refusal, _ in self.blocks]),
        )


def _judge(plugin: str, spec: KernelSpec, problem: Problem, demands: Demands) -> _Judged:
    refusals = refusals_for(spec, problem, demands.machine)
    fidelity = spec.schemes.get(demands.scheme)
    try:
        size = spec.bytes_for(problem)
    except Exception as error:  # somebody else's code
        size = 0
        refusals.append(Refusal(Code.CHECK_FAILED, f"its bytes raised {type(error).__name__}: {error}"))
    return _Judged(
        spec=spec,
        plugin=plugin,
        fidelity=fidelity,
        priority=spec.priority_for(demands.machine, demands.scheme),
        place=demands.preferred(spec)[0],
        bytes=size,
        refusals=refusals,
        blocks=[] if refusals or fidelity is None else blocks_of(spec, fidelity, size, demands),
    )


def _decided_by(winner: _Judged | None, judged: Sequence[_Judged], demands: Demands) -> str:
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
            if policy is not None:
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
    if not resolution.candidates:
        lines.append(f"  no plugin declares a kernel for {resolution.problem.op} (plugins may be missing or disabled)")
    hints = {refusal.hint for candidate in resolution.candidates for refusal in candidate.refusals}
    lines += ["to go on:", *(f"  {hint}" for hint in sorted(hints))]
    lines += [] if hints else ["  run `halfbyte doctor` to see what is installed"]
    return "\n".join(lines)
