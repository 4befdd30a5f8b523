"""What this distribution declares to halfbyte. Torch-free: a kernel's module is imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.plugins import hookimpl
from halfbyte.specs import KernelSpec
from halfbyte_xpu.ipex.specs import SPECS as IPEX
from halfbyte_xpu.torch_xpu.specs import SPECS as TORCH
from halfbyte_xpu.vllm_kernels.specs import SPECS as VLLM_KERNELS


@hookimpl
def halfbyte_api_version() -> int:
    """Return the version of the plugin contract that this plugin was written for."""
    return 1


@hookimpl
def halfbyte_kernels() -> Sequence[KernelSpec]:
    """Return the kernels of every library: vllm-xpu-kernels, torch itself, intel-extension-for-pytorch."""
    return (*VLLM_KERNELS, *TORCH, *IPEX)
