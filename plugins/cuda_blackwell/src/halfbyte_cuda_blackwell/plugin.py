"""What this distribution declares to halfbyte. Torch-free: a kernel's module is imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.plugins import hookimpl
from halfbyte.specs import API_VERSION, KernelSpec
from halfbyte_cuda_blackwell.experts_specs import EXPERTS
from halfbyte_cuda_blackwell.linear_specs import LINEAR


@hookimpl
def halfbyte_api_version() -> int:
    """Return the version of the plugin contract that this plugin was written for."""
    return API_VERSION


@hookimpl
def halfbyte_kernels() -> Sequence[KernelSpec]:
    """Return FlashInfer's linear kernels, then its experts."""
    return (*LINEAR, *EXPERTS)
