"""vllm-xpu-kernels, loaded: its shared libraries imported, its operators checked against what we call."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Final

import torch

from halfbyte.errors import PluginError, UsageError
from halfbyte_xpu.vllm_kernels.schemas import DISTRIBUTION, IS_XE2, IS_XE3, PACKAGE, Op

#: Variables of the library under which XpuFusedMoe computes something else than it is declared to, and what.
_VARIABLES: Final = {
    "VLLM_XPU_FORCE_XE_DEFAULT_KERNEL": "runs a kernel that never gets the weights' scales",
    "VLLM_XPU_FUSED_MOE_USE_REF": "runs a slow reference that quantizes activations to MXFP4",
    "VLLM_XPU_FUSED_MOE_USE_MXFP4_FP8": "quantizes activations to FP8",
}
_OFF: Final = ("", "0", "OFF", "FALSE", "NO", "N")


@cache
def load(ops: tuple[Op, ...]) -> None:
    """Import the libraries that register these operators; PluginError if one is missing or has another schema.

    Importing them raises whatever the loader says, such as for a wheel compiled for another torch.
    """
    for library in dict.fromkeys(op.library for op in ops):
        import_module(f"{PACKAGE}.{library}")
    for op in ops:
        packet = getattr(getattr(torch.ops, op.library), op.name, None)
        found = None if packet is None else packet.default._schema
        expected = torch._C.parse_schema(f"{op.library}::{op.schema}")
        if found != expected:
            raise PluginError(
                f"{DISTRIBUTION}: {op} is {found or 'not registered'}; this plugin calls {expected}; "
                f"install a version that has it, or set HALFBYTE_DENY='xpu.*'"
            )


def check_device(device: torch.device) -> None:
    """PluginError unless the library itself counts the device as Xe2 or Xe3: on others it drops the weights' scales."""
    if device.type != "xpu":
        return
    index = torch.xpu.current_device() if device.index is None else device.index
    if any(getattr(torch.ops._xpu_C, op.name)(index) for op in (IS_XE2, IS_XE3)):
        return
    raise PluginError(
        f"{DISTRIBUTION} counts {device} ({torch.xpu.get_device_name(index)}) as neither Xe2 nor Xe3, and its kernel "
        "for other devices ignores MXFP4 scales; set HALFBYTE_DENY=xpu.fused-moe"
    )


def check_environment() -> None:
    """UsageError naming the variable if one makes XpuFusedMoe compute something else than it is declared to."""
    for name, effect in _VARIABLES.items():
        value = os.environ.get(name, "").strip()
        if value.upper() not in _OFF:
            raise UsageError(
                f"with {name}={value} in the environment {DISTRIBUTION} {effect}; unset it, or set "
                "HALFBYTE_DENY=xpu.fused-moe"
            )
