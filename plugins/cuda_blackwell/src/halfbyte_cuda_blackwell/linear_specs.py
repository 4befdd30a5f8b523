"""What FlashInfer's linear kernels declare. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from halfbyte.eligibility import required_version
from halfbyte.machines import Machine
from halfbyte.problems import Problem, bias_bytes, round_up
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity, KernelSpec, PriorityRule, Proof, Rounding
from halfbyte_cuda_blackwell.backends import (
    BACKENDS,
    WEIGHT_ONLY,
    WEIGHT_ONLY_MULTIPLE,
    WEIGHT_ONLY_REQUIRES,
    Backend,
)
from halfbyte_cuda_blackwell.common import FLASHINFER, INSTALL
from halfbyte_cuda_blackwell.known_bad import known_bad

#: The order of the back ends where no rule says otherwise: NVFP4, then MXFP4, which CUTLASS and trtllm do not compute.
_NVFP4: Final = {"cutlass": 450, "cudnn": 440, "cute-dsl": 430, "b12x": 410, "trtllm": 420}
_MXFP4: Final = {"cute-dsl": 450, "cudnn": 440, "b12x": 410}
_CLASSES: Final = {
    "cutlass": "Cutlass",
    "cudnn": "Cudnn",
    "trtllm": "Trtllm",
    "cute-dsl": "CuteDsl",
    "b12x": "B12x",
}


def _priority(name: str) -> tuple[PriorityRule, ...]:
    """b12x leads on SM120 alone: on SM121 FlashInfer's own choice leaves it out."""
    rules = [PriorityRule(priority=_NVFP4[name], schemes=("nvfp4-*",))]
    if name in _MXFP4:
        rules.append(PriorityRule(priority=_MXFP4[name], schemes=("mxfp4-*",)))
    if name == "b12x":
        rules.insert(0, PriorityRule(priority=460, devices=("sm_120",)))
    return tuple(rules)


def _swizzled_bytes(problem: Problem) -> int:
    """Codes, scales in whole tiles of 128 rows x 4 columns, and a few scalars."""
    ((n, k),) = problem.matrices
    scales = round_up(n, 128) * round_up(k // problem.scheme.weights.group_size, 4)
    return n * k // 2 + scales + 8 + bias_bytes(problem)


def _quantizing(backend: Backend) -> KernelSpec:
    """A kernel over `mm_fp4`: weights and activations in FP4."""
    kernel_id = f"flashinfer.{backend.name}"
    return KernelSpec(
        id=kernel_id,
        op="linear",
        target=f"halfbyte_cuda_blackwell.linear:{_CLASSES[backend.name]}",
        devices=_devices(backend.capabilities),
        requires=(FLASHINFER, *backend.requires),
        install=INSTALL,
        schemes={f"{name}-w4a4": Fidelity.NATIVE for name in backend.formats},
        dtypes=backend.dtypes,
        n_multiple=backend.n_multiple,
        k_multiple=backend.k_multiple,
        activation_rounding=Rounding(scale="ceil", ties="even"),
        priority=_priority(backend.name),
        proof=Proof.CONTRACT_DOUBLE,
        known_bad=known_bad("linear", kernel_id),
        resident_bytes=_swizzled_bytes,
    )


def _devices(capabilities: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"sm_{capability}" for capability in capabilities)


def _weight_only_check(_: Problem, machine: Machine) -> Sequence[Refusal]:
    """What the capability's back end needs; the declaration's own `requires` is for all capabilities."""
    backend = WEIGHT_ONLY.get(machine.capability or 0)
    if backend is None:
        return ()
    requirement = WEIGHT_ONLY_REQUIRES[backend]
    met, version = required_version(machine, requirement)
    if met:
        return ()
    needs = f"its back end on {machine.arch} ({backend}) needs {requirement}"
    if version is None:
        return (Refusal(Code.PACKAGE_MISSING, f"{needs}, which is not installed", INSTALL),)
    return (Refusal(Code.PACKAGE_VERSION, f"{needs}; {version} is installed", INSTALL),)


_WEIGHT_ONLY: Final = KernelSpec(
    id="flashinfer.bf16-fp4",
    op="linear",
    target="halfbyte_cuda_blackwell.weight_only:Bf16Fp4",
    devices=_devices(tuple(WEIGHT_ONLY)),
    requires=(FLASHINFER,),
    install=INSTALL,
    schemes={"nvfp4-w4a16": Fidelity.NATIVE, "nvfp4-w4a4": Fidelity.WEIGHT_ONLY},
    dtypes=("bfloat16",),
    n_multiple=WEIGHT_ONLY_MULTIPLE,
    k_multiple=WEIGHT_ONLY_MULTIPLE,
    priority=280,
    proof=Proof.CONTRACT_DOUBLE,
    known_bad=known_bad("linear", "flashinfer.bf16-fp4"),
    check=_weight_only_check,
    resident_bytes=_swizzled_bytes,
)

LINEAR: Final = (*map(_quantizing, BACKENDS.values()), _WEIGHT_ONLY)
