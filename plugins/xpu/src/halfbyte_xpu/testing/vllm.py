"""A double of vllm-xpu-kernels: its operators under its own schemas, for CPU tensors, and its modules."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch

from halfbyte_xpu.testing import vllm_experts, vllm_linear
from halfbyte_xpu.vllm_kernels import schemas
from halfbyte_xpu.vllm_kernels.schemas import Op

#: The module and function that computes each operator.
HOMES: Final = {
    schemas.QUANTIZE: (vllm_linear, "per_token_group_quant_mxfp4"),
    schemas.FP4_GEMM: (vllm_linear, "fp4_gemm"),
    schemas.GROUPED_GEMM: (vllm_experts, "grouped_gemm"),
    schemas.REMAP: (vllm_experts, "remap_hidden_states"),
    schemas.GATHER: (vllm_experts, "moe_gather"),
    **{op: (vllm_experts, op.name) for op in schemas.ACTIVATION_OPS.values()},
}
#: Kept as long as the process: a library that is collected takes its operators with it.
LIBRARIES: Final[list[torch.library.Library]] = []


def install() -> None:
    """Register the operators and put the modules into sys.modules, once; RuntimeError where the real ones are."""
    if LIBRARIES:
        return
    for op in (*schemas.LINEAR_OPS, *schemas.EXPERTS_OPS):
        if hasattr(getattr(torch.ops, op.library), op.name):
            raise RuntimeError(f"{op} is registered already: the double must not meet the vendor's library")
        library = torch.library.Library(op.library, "FRAGMENT")
        LIBRARIES.append(library)
        library.define(op.schema)
        library.impl(op.name, implementation(op), "CPU" if op in HOMES else "CompositeImplicitAutograd")
    package = ModuleType(schemas.PACKAGE)
    package.__path__ = []
    interface = ModuleType(f"{schemas.PACKAGE}.fused_moe_interface")
    interface.XpuFusedMoe = vllm_experts.XpuFusedMoe  # type: ignore[attr-defined]
    libraries = [ModuleType(f"{schemas.PACKAGE}.{name}") for name in ("_C", "_xpu_C", "_moe_C")]
    sys.modules.update({module.__name__: module for module in (package, interface, *libraries)})


def implementation(op: Op) -> Callable[..., Any]:
    """What computes an operator here."""
    if op not in HOMES:  # the two questions about the device
        return lambda device_index=-1: op is schemas.IS_XE2  # noqa: ARG005 - the vendor's signature
    home, name = HOMES[op]

    def call(*arguments: Any) -> Any:
        # Looked up at each call, so that a test may put another one there.
        return getattr(home, name)(*arguments)

    return call
