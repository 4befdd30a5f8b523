"""intel-extension-for-pytorch, loaded: only where metadata says that it will not end the process."""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from typing import Final

import torch
from torch import Tensor

from halfbyte.errors import PluginError
from halfbyte_xpu.ipex.specs import DISTRIBUTION, mismatches

#: Schemas inferred from its C++ functions: nothing says that `out` is written.
LINEAR: Final = "mm_mxfp4_out_marlin"
EXPERTS: Final = "group_mm_mxfp4_out_marlin"


def installed() -> str | None:
    """The installed version with its local tag; None if there is none."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


@cache
def load(name: str) -> None:
    """Import the library and look for its operator; PluginError if the build has no FP4 or does not match torch."""
    version = installed()
    wrong = mismatches(version, torch.__version__) if version else [f"{DISTRIBUTION} is not installed"]
    if wrong:
        raise PluginError("; ".join(wrong))
    import_module("intel_extension_for_pytorch")
    if not hasattr(torch.ops.torch_ipex, name):
        raise PluginError(
            f"{DISTRIBUTION} {version} registers no torch_ipex::{name}, which builds for Intel "
            "GPUs have in 2.10.10; set HALFBYTE_DENY=xpu.ipex"
        )


def product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Return x [M, K] @ W [K, N] in bfloat16, of `packing.pack`'s tensors of one matrix."""
    y = torch.zeros(x.shape[0], scales.shape[-1], dtype=x.dtype, device=x.device)
    torch.ops.torch_ipex.mm_mxfp4_out_marlin(y, x, weight, scales, 32)
    return y


def grouped_product(x: Tensor, weight: Tensor, scales: Tensor, rows: Tensor) -> Tensor:
    """The same for experts: rows of x [M, K] in the order of their experts, `rows` int32 [E] of them each.

    Rows beyond their sum are zero.
    """
    y = torch.zeros(x.shape[0], scales.shape[-1], dtype=x.dtype, device=x.device)
    torch.ops.torch_ipex.group_mm_mxfp4_out_marlin(y, x, weight, scales, None, rows, 32)
    return y
