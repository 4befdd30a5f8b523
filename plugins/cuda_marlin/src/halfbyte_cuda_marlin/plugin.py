"""What this distribution declares to halfbyte. Torch-free: a kernel's module is imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.plugins import hookimpl
from halfbyte.specs import API_VERSION, KernelSpec
from halfbyte_cuda_marlin.cuda.specs import SPECS as CUDA
from halfbyte_cuda_marlin.humming.specs import SPECS as HUMMING
from halfbyte_cuda_marlin.vllm.specs import SPECS as VLLM


@hookimpl
def halfbyte_api_version() -> int:
    """Return the version of the plugin contract that this plugin was written for."""
    return API_VERSION


@hookimpl
def halfbyte_kernels() -> Sequence[KernelSpec]:
    """Return our own kernels, then those of the libraries that may be installed beside them."""
    return (*CUDA, *VLLM, *HUMMING)
