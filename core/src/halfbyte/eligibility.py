"""Whether a kernel can run a problem on a machine at all: two phases of "no", every refusal collected."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from halfbyte.machines import Machine, matches
from halfbyte.problems import INPUT_SCALES, ExpertsProblem, Problem
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import KernelSpec


def refusals_for(spec: KernelSpec, problem: Problem, machine: Machine) -> list[Refusal]:
    """Every reason why the kernel cannot run the problem on the machine; empty if it can."""
    refusals = [*_machine_refusals(spec, machine), *_problem_refusals(spec, problem)]
    if spec.check is None:
        return refusals
    try:
        own = list(spec.check(problem, machine))
    except Exception as error:  # somebody else's code: a kernel of which nothing is known is not chosen
        return [*refusals, Refusal(Code.CHECK_FAILED, f"its check raised {type(error).__name__}: {error}")]
    if not all(isinstance(refusal, Refusal) for refusal in own):
        return [*refusals, Refusal(Code.CHECK_FAILED, f"its check returned {own!r}, which are no refusals")]
    return [*refusals, *own]


def scale_refusals(spec: KernelSpec, problem: ExpertsProblem) -> list[Refusal]:
    """What the numbers of the experts' scales refuse, as far as they are known."""
    refusals = []
    if spec.global_scales == "per-expert" and problem.gated and problem.shared_global_scale is False:
        detail = "takes one global scale for gate and up, and theirs cannot be made one exactly"
        refusals.append(Refusal(Code.GLOBAL_SCALES, detail))
    if spec.quantizes(problem.scheme.name) and problem.input_scales is not None:
        found, taken = INPUT_SCALES.index(problem.input_scales), INPUT_SCALES.index(spec.input_scales)
        if found < taken:
            what = "gate and up" if problem.input_scales == "per-expert" else "down"
            detail = f"takes one input scale for {what} of all experts, and theirs differ"
            refusals.append(Refusal(Code.INPUT_SCALES, detail))
    return refusals


def required_version(machine: Machine, requirement: str) -> tuple[bool, str | None]:
    """Whether the machine's libraries meet a requirement, and the version found (None: not installed)."""
    if machine.packages is None:
        return True, None
    parsed = Requirement(requirement)
    if parsed.marker is not None and not parsed.marker.evaluate():
        return True, None
    version = dict(machine.packages).get(canonicalize_name(parsed.name))
    return version is not None and parsed.specifier.contains(version, prereleases=True), version


def _machine_refusals(spec: KernelSpec, machine: Machine) -> list[Refusal]:
    refusals = []
    if not any(matches(pattern, machine) for pattern in spec.devices):
        refusals.append(Refusal(Code.DEVICE, f"runs on {', '.join(spec.devices)}; this is {machine.arch}"))
    for requirement in spec.requires:
        met, version = required_version(machine, requirement)
        if met:
            continue
        install = spec.install or f"pip install '{requirement}'"
        if version is None:
            refusals.append(Refusal(Code.PACKAGE_MISSING, f"needs {requirement}, which is not installed", install))
        else:
            detail = f"needs {requirement}; {Requirement(requirement).name} {version} is installed"
            refusals.append(Refusal(Code.PACKAGE_VERSION, detail, install))
    return refusals


def _problem_refusals(spec: KernelSpec, problem: Problem) -> list[Refusal]:
    refusals = []
    if problem.scheme.name not in spec.schemes:
        refusals.append(Refusal(Code.SCHEME, f"computes {', '.join(spec.schemes)}; this is {problem.scheme}"))
    if problem.dtype not in spec.dtypes:
        refusals.append(Refusal(Code.DTYPE, f"takes {', '.join(spec.dtypes)}; this is {problem.dtype}"))
    refusals += _alignment_refusals(spec, problem)
    if isinstance(problem, ExpertsProblem):
        refusals += _experts_refusals(spec, problem)
    return refusals


def _alignment_refusals(spec: KernelSpec, problem: Problem) -> list[Refusal]:
    if spec.pads:
        return []
    refusals = []
    for code, letter, multiple, axis in (
        (Code.N_MULTIPLE, "N", spec.n_multiple, 0),
        (Code.K_MULTIPLE, "K", spec.k_multiple, 1),
    ):
        off = sorted({sizes[axis] for sizes in problem.matrices if sizes[axis] % multiple})
        refusals += [Refusal(code, f"{letter}={size} is not a multiple of {multiple}") for size in off]
    return refusals


def _experts_refusals(spec: KernelSpec, problem: ExpertsProblem) -> list[Refusal]:
    refusals = []
    if problem.activation not in spec.activations:
        detail = f"computes {', '.join(spec.activations)}; the experts use {problem.activation}"
        refusals.append(Refusal(Code.ACTIVATION, detail))
    if problem.bias and not spec.fuses_bias:
        refusals.append(Refusal(Code.BIAS, "the experts have biases, which it cannot add"))
    return [*refusals, *scale_refusals(spec, problem)]
