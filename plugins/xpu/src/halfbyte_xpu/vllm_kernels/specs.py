"""What the kernels of vllm-xpu-kernels declare. Torch-free."""

from __future__ import annotations

from typing import Final

from halfbyte.machines import Machine
from halfbyte.problems import ExpertsProblem, Problem
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity, KernelSpec, Proof, Rounding
from halfbyte_xpu.devices import WITH_FP4, without_fp4
from halfbyte_xpu.vllm_kernels import schemas

#: The numbers of experts for each token that its kernels are compiled for.
TOP_K: Final = (1, 2, 4, 6, 7, 8, 10, 16)
MAX_EXPERTS: Final = 1024
# XpuFusedMoe with an expert map, and one recipe for all weight types, since 0.1.12.
_REQUIRES: Final = ("vllm-xpu-kernels>=0.1.12",)
_INSTALL: Final = "pip install 'halfbyte[xpu]', with the XPU build of torch that vllm-xpu-kernels was compiled for"


def _linear_check(problem: Problem, machine: Machine) -> list[Refusal]:  # noqa: ARG001 - what a check is called with
    return [*without_fp4(machine), *_wheel_refusals(machine, schemas.LINEAR_OPS)]


def _experts_check(problem: Problem, machine: Machine) -> list[Refusal]:
    refusals = [*without_fp4(machine), *_wheel_refusals(machine, schemas.EXPERTS_OPS)]
    if isinstance(problem, ExpertsProblem):
        if problem.top_k not in TOP_K:
            sizes = ", ".join(map(str, TOP_K))
            refusals.append(Refusal(Code.LIMIT, f"{problem.top_k} experts for each token; it is compiled for {sizes}"))
        if problem.experts > MAX_EXPERTS:
            detail = f"{problem.experts} experts on one device are above {MAX_EXPERTS}"
            refusals.append(Refusal(Code.LIMIT, detail))
    return refusals


def _wheel_refusals(machine: Machine, ops: tuple[schemas.Op, ...]) -> list[Refusal]:
    version = dict(machine.packages or ()).get(schemas.DISTRIBUTION)
    if version is None:
        return []
    return [
        Refusal(Code.PACKAGE_VERSION, f"{schemas.DISTRIBUTION} {version}: {fault}", _INSTALL)
        for fault in schemas.faults(ops, version)
    ]


SPECS: Final = (
    KernelSpec(
        id="xpu.fp4-gemm",
        op="linear",
        target="halfbyte_xpu.vllm_kernels.linear:Fp4Gemm",
        devices=WITH_FP4,
        requires=_REQUIRES,
        install=_INSTALL,
        schemes={"mxfp4-w4a4": Fidelity.NATIVE, "mxfp4-w4a16": Fidelity.QUANTIZES_ACTIVATIONS},
        fuses_bias=True,
        activation_rounding=Rounding(scale="ceil", ties="toward-zero"),
        priority=230,
        proof=Proof.VENDOR_CODE,
        check=_linear_check,
    ),
    KernelSpec(
        id="xpu.fused-moe",
        op="experts",
        target="halfbyte_xpu.vllm_kernels.experts:FusedMoe",
        devices=WITH_FP4,
        requires=_REQUIRES,
        install=_INSTALL,
        schemes={"mxfp4-w4a16": Fidelity.NATIVE, "mxfp4-w4a4": Fidelity.WEIGHT_ONLY},
        fuses_bias=True,
        # In halves [gate | up], but alternating rows for swigluoai: no one order for all.
        activations=("silu", "gelu_tanh", "swigluoai", "relu2"),
        priority=230,
        proof=Proof.CONTRACT_DOUBLE,
        check=_experts_check,
    ),
)
