"""A double of intel-extension-for-pytorch's two MXFP4 operators, by what its own tests expect of them, on a CPU.

It checks nothing of its own: everything here is strict.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from halfbyte_xpu.ipex import library as ours
from halfbyte_xpu.testing import numbers
from halfbyte_xpu.testing.vllm_linear import check

#: The nibble of a word in which code 0, 1, ... along K lies.
_PLACES: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_LIBRARIES: Final[list[torch.library.Library]] = []


def mm(out: Tensor, x: Tensor, weight: Tensor, scales: Tensor, group_size: int) -> None:
    """Write x @ W in bfloat16."""
    k, n = x.shape[-1], scales.shape[-1]
    check({out.dtype, x.dtype} == {torch.bfloat16}, f"strict: x is {x.dtype}, out {out.dtype}")
    check(group_size == 32, f"strict: groups of {group_size}")
    check(weight.dtype == torch.int32 and tuple(weight.shape) == (k // 8, n), f"strict: weight {list(weight.shape)}")
    check(scales.dtype == torch.uint8 and tuple(scales.shape) == (k // 32, n), f"strict: scales {list(scales.shape)}")
    check(tuple(out.shape) == (x.shape[0], n), f"strict: out {list(out.shape)}")
    check(all(t.is_contiguous() for t in (out, x, weight, scales)), "strict: tensors are read by their addresses")
    nibbles = torch.stack([weight >> (4 * place) & 0xF for place in _PLACES], dim=1).view(k, n).to(torch.uint8)
    values = numbers.scaled(numbers.decode(numbers.pack(nibbles.t())), numbers.e8m0(scales).t())
    out.copy_(x.float() @ values.t())


def group_mm(
    out: Tensor, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, rows: Tensor, group_size: int
) -> None:
    """Write the same for the rows of each expert in turn."""
    check(bias is None, "strict: bias is not used")
    check(rows.dtype == torch.int32 and rows.shape[0] == weight.shape[0], f"strict: rows {rows.dtype}")
    check(int(rows.sum()) <= x.shape[0], "strict: more rows than there are")
    start = 0
    for expert, count in enumerate(rows.tolist()):
        if count:
            here = slice(start, start + count)
            mm(out[here], x[here], weight[expert], scales[expert], group_size)
        start += count


def install() -> None:
    """Register the operators and put a module into sys.modules, once."""
    if _LIBRARIES:
        return
    library = torch.library.Library("torch_ipex", "FRAGMENT")
    _LIBRARIES.append(library)
    tensors = "Tensor out, Tensor x, Tensor weight, Tensor scales"
    library.define(f"{ours.LINEAR}({tensors}, int group_size) -> ()")
    library.define(f"{ours.EXPERTS}({tensors}, Tensor? bias, Tensor rows, int group_size) -> ()")
    library.impl(ours.LINEAR, mm, "CPU")
    library.impl(ours.EXPERTS, group_mm, "CPU")
    name = "intel_extension_for_pytorch"
    sys.modules[name] = ModuleType(name)
    ours.installed = _matching_version


def _matching_version() -> str:
    return ".".join(torch.__version__.split(".")[:2]) + ".10+xpu"
