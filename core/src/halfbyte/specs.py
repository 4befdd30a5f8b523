"""KernelSpec: everything that a kernel declares about itself. Torch-free; the kernel's code is named, not imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Final, Literal

from packaging.requirements import InvalidRequirement, Requirement

from halfbyte.errors import UsageError, nearest
from halfbyte.machines import Machine, check_pattern, matches
from halfbyte.problems import ACTIVATIONS, DTYPES, INPUT_SCALES, OPS, InputScales, Problem, packed_bytes
from halfbyte.refusals import Refusal
from halfbyte.schemes import SCHEMES

#: The version of this contract. A plugin says which one it was written for.
API_VERSION: Final = 1

_ID: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_TARGET: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_GLOBAL_SCALES: Final = {"linear": ("one", "per-row"), "experts": ("per-expert", "per-projection")}


class Fidelity(StrEnum):
    """What a kernel computes for a scheme, best first."""

    NATIVE = "native"  # the scheme's own formats, in the kernel
    WEIGHT_ONLY = "weight-only"  # activations stay in 16 or 32 bits where the scheme would quantize them
    EMULATED = "emulated"  # dequantize, then an ordinary matrix product
    QUANTIZES_ACTIVATIONS = "quantizes-activations"  # less precise than the checkpoint asks

    @property
    def rank(self) -> int:
        """0 for the best."""
        return list(Fidelity).index(self)


class Proof(StrEnum):
    """How far a kernel was proved, best first."""

    HARDWARE = "hardware"  # ran and passed the conformance kit on the device
    VENDOR_CODE = "vendor-code"  # the vendor's own code checked or computed it, on another device
    CONTRACT_DOUBLE = "contract-double"  # passed the kit over a double of the vendor's library
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a kernel quantizes activations: its MXFP4 scale rule, and what it does with E2M1 ties.

    `input_scale` is its NVFP4 input scale where the checkpoint has none; None: that of all of x, amax / 2688.
    """

    scale: Literal["floor", "ceil", "even"] = "even"
    ties: Literal["even", "toward-zero"] = "even"
    input_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorityRule:
    """A priority for some devices (patterns of machines.py) and schemes (globs)."""

    priority: int
    devices: tuple[str, ...] = ("any",)
    schemes: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBad:
    """A combination that is known to fail: which one, what happens, the public thread, where it is mended.

    `requires` narrows it to versions of a distribution, such as "flashinfer-python<0.7.3".
    """

    effect: str
    thread: str
    devices: tuple[str, ...] = ("any",)
    schemes: tuple[str, ...] = ("*",)
    requires: str = ""
    fixed_in: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """What a kernel is, needs, can do and costs. `id` and `op` together are unique."""

    id: str
    op: str
    #: "package.module:Class", imported only when the kernel is chosen.
    target: str
    #: Device patterns: any, cpu, cuda, xpu, xpu-bmg, sm_90, sm_80..sm_89, sm_80..
    devices: tuple[str, ...]
    #: Scheme name to fidelity: what it can run, and what it then computes.
    schemes: Mapping[str, Fidelity]
    #: Distributions with version ranges (PEP 508), checked by metadata alone.
    requires: tuple[str, ...] = ()
    #: The line that installs what it requires, for the hint of a refusal.
    install: str = ""
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    #: Alignment of output and input sizes. For experts, hidden and intermediate are each both.
    n_multiple: int = 1
    k_multiple: int = 1
    #: Whether core may pad with zeros to meet the alignment.
    pads: bool = True
    #: Linear: adds the bias itself (else core does). Experts: can add the experts' biases (else they are refused).
    fuses_bias: bool = False
    #: Experts: activation functions, and the order of gate and up in one fused tensor, if it wants one.
    activations: tuple[str, ...] = ()
    gated_order: Literal["gate-up", "up-gate", "interleaved"] | None = None
    #: Linear: "one" or "per-row". Experts: "per-expert" (one for gate and up) or "per-projection".
    global_scales: str = ""
    #: Experts whose activations it quantizes: the input scales that it takes (those with fewer numbers too).
    input_scales: InputScales = "per-expert"
    #: The rounding of its activation quantizer, if it has one.
    activation_rounding: Rounding | None = None
    #: Bands: built-ins 0 to 99, vendor libraries 200 to 299, tuned kernels 300 to 399, native FP4 hardware 400 to 499.
    #: A table's first rule that fits counts.
    priority: int | tuple[PriorityRule, ...]
    #: False: never chosen by itself, only by require or prefer.
    auto: bool = True
    #: How far it was proved: on every device that it runs on, or by device pattern (the first that fits; else none).
    proof: Proof | Mapping[str, Proof] = Proof.NONE
    known_bad: tuple[KnownBad, ...] = ()
    #: Further refusals. Pure and torch-free.
    check: Callable[[Problem, Machine], Sequence[Refusal]] | None = None
    #: In which form the weights stay in memory, and how many bytes that is (of the padded problem).
    keeps: Literal["packed", "dequantized"] = "packed"
    resident_bytes: Callable[[Problem], int] = field(default=packed_bytes)

    def __post_init__(self) -> None:
        """UsageError naming the kernel and the field, if the declaration makes no sense."""
        object.__setattr__(self, "schemes", MappingProxyType(dict(self.schemes)))
        if not isinstance(self.proof, Proof):
            object.__setattr__(self, "proof", MappingProxyType(dict(self.proof)))
        if not self.global_scales and self.op in _GLOBAL_SCALES:
            object.__setattr__(self, "global_scales", _GLOBAL_SCALES[self.op][0])
        for fault in _declaration_faults(self):
            raise UsageError(f"kernel {self.id!r} ({self.op}): {fault}")

    def priority_for(self, machine: Machine, scheme: str) -> int:
        """The kernel's priority on this machine for this scheme."""
        if isinstance(self.priority, int):
            return self.priority
        fitting = (rule.priority for rule in self.priority if applies(rule, machine, scheme))
        return next(fitting, 0)

    def quantizes(self, scheme: str) -> bool:
        """Whether the kernel quantizes activations when it runs this scheme; False for one that it does not run."""
        fidelity = self.schemes.get(scheme)
        if SCHEMES[scheme].activations is None:
            return fidelity is Fidelity.QUANTIZES_ACTIVATIONS
        return fidelity not in (None, Fidelity.WEIGHT_ONLY)

    def bytes_for(self, problem: Problem) -> int:
        """Bytes that the problem's weights take once they are padded and prepared for the kernel."""
        return self.resident_bytes(problem.padded(self.n_multiple, self.k_multiple))

    def proof_for(self, machine: Machine) -> Proof:
        """How far the kernel was proved on this kind of machine."""
        return next((proof for pattern, proof in self.proofs if matches(pattern, machine)), Proof.NONE)

    @property
    def proofs(self) -> tuple[tuple[str, Proof], ...]:
        """(device pattern, proof) for every statement that the declaration makes."""
        return (("any", self.proof),) if isinstance(self.proof, Proof) else tuple(self.proof.items())


def applies(rule: PriorityRule | KnownBad, machine: Machine, scheme: str) -> bool:
    """Whether a rule of a declaration is about this machine and scheme."""
    return any(matches(pattern, machine) for pattern in rule.devices) and any(
        fnmatchcase(scheme, glob) for glob in rule.schemes
    )


def _declaration_faults(spec: KernelSpec) -> Iterator[str]:
    if not _ID.fullmatch(spec.id):
        yield "id must be lower-case words joined by dots, such as 'vendor.kernel'"
    if spec.op not in OPS:
        yield f"unknown op {spec.op!r}{nearest(spec.op, OPS)}"
    if not _TARGET.fullmatch(spec.target):
        yield f"target {spec.target!r} is not 'package.module:Class'"
    for name in ("schemes", "devices", "dtypes"):
        if not getattr(spec, name):
            yield f"{name} is empty"
    if spec.op == "experts" and not spec.activations:
        yield "an experts kernel declares its activations"
    if spec.n_multiple < 1 or spec.k_multiple < 1:
        yield f"n_multiple={spec.n_multiple}, k_multiple={spec.k_multiple} must be at least 1"
    yield from _value_faults(spec)
    yield from _pattern_faults(spec)


def _value_faults(spec: KernelSpec) -> Iterator[str]:
    for what, names, known in (
        ("scheme", spec.schemes, SCHEMES),
        ("dtype", spec.dtypes, DTYPES),
        ("activation", spec.activations, ACTIVATIONS),
        ("global_scales", (spec.global_scales,), _GLOBAL_SCALES.get(spec.op, (spec.global_scales,))),
        ("input_scales", (spec.input_scales,), INPUT_SCALES),
        ("keeps", (spec.keeps,), ("packed", "dequantized")),
        ("gated_order", (spec.gated_order,), (None, "gate-up", "up-gate", "interleaved")),
    ):
        for name in names:
            if name not in known:
                yield f"unknown {what} {name!r}{nearest(str(name), map(str, known))}"
    for what, values, kind in (
        ("fidelity", spec.schemes.values(), Fidelity),
        ("proof", (proof for _, proof in spec.proofs), Proof),
        ("priority", spec.priority if isinstance(spec.priority, tuple) else (), PriorityRule),
        ("priority", () if isinstance(spec.priority, tuple) else (spec.priority,), int),
        ("known_bad", spec.known_bad, KnownBad),
        ("activation_rounding", () if spec.activation_rounding is None else (spec.activation_rounding,), Rounding),
    ):
        for value in values:
            if not isinstance(value, kind):
                yield f"{what} {value!r} is not a {kind.__name__}"


def _pattern_faults(spec: KernelSpec) -> Iterator[str]:
    table = spec.priority if isinstance(spec.priority, tuple) else ()
    rules: tuple[PriorityRule | KnownBad, ...] = (*spec.known_bad, *table)
    proved = (pattern for pattern, _ in spec.proofs)
    for pattern in (*spec.devices, *proved, *(p for rule in rules for p in rule.devices)):
        try:
            check_pattern(pattern)
        except UsageError as error:
            yield str(error)
    for text in (*spec.requires, *(bad.requires for bad in spec.known_bad if bad.requires)):
        try:
            Requirement(text)
        except InvalidRequirement as error:
            yield f"requirement {text!r}: {error}"
