"""Give what xpu.scaled-mm passes to the meta functions of torch 2.14, on fake tensors of an Intel GPU.

    python -m venv VENV
    VENV/bin/pip install "torch>=2.14" numpy -e "core[conformance]"
    VENV/bin/pip install --no-deps -e plugins/xpu
    VENV/bin/python tools/xpu_torch_meta.py

Of torch's two entries only the older one, `torch._scaled_mm`, checks strides, multiples and numbers of scales there;
the one that the kernel calls checks sizes. Both get the same tensors. Where torch is too old, the older one has to
refuse: it then knows CUDA's padded scales alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from halfbyte.conformance import data
from halfbyte.kernels import Packed
from halfbyte.schemes import MXFP4_W4A4, NVFP4_W4A4
from halfbyte_xpu.torch_xpu.linear import ScaledMm

_SIZES: Final = ((16, 32), (64, 128), (48, 96), (2880, 2880))


def main() -> int:
    """Print what was accepted; exit code 1 where torch refused something."""
    theirs = F.scaled_mm
    accepted, refused = 0, []

    def fake(*arguments: Any, **options: Any) -> Tensor:
        nonlocal accepted
        x, weight = arguments[:2]
        try:
            with FakeTensorMode():
                check(theirs, *pytree.tree_map_only(Tensor, _on_xpu, (arguments, options)))
            accepted += 1
        except (RuntimeError, AssertionError) as error:
            refused.append(f"{list(x.shape)} @ {list(weight.shape)}: {str(error).splitlines()[0]}")
        return torch.empty(x.shape[0], weight.shape[1], dtype=options["output_dtype"])

    F.scaled_mm = fake
    kernel = ScaledMm()
    for scheme, (n, k), dtype in product((MXFP4_W4A4, NVFP4_W4A4), _SIZES, (torch.bfloat16, torch.float16)):
        weights = data.linear_weights(scheme, n, k, dtype=dtype)
        problem = weights.problem(dtype)
        packed = Packed(problem, kernel.prepare(weights, problem))
        for rows in (1, 2, 129):
            kernel.apply(data.activations(rows, k, dtype), packed, None)
    print("\n".join(refused))
    print(f"torch {torch.__version__}: {accepted} calls accepted, {len(refused)} refused")
    return 1 if refused else 0


def check(theirs: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Call both entries with the tensors; AssertionError unless they agree on what comes out, and where."""
    mat_a, mat_b, scale_a, _, scale_b, *_ = arguments
    older = torch._scaled_mm(mat_a, mat_b, scale_a[0], scale_b[0].t(), out_dtype=options["output_dtype"])
    newer = theirs(*arguments, **options)
    for result in (older, newer):
        found = (tuple(result.shape), result.dtype, result.device.type)
        expected = ((mat_a.shape[0], mat_b.shape[1]), options["output_dtype"], "xpu")
        if found != expected:
            raise AssertionError(f"the result is {found}, not {expected}")


def _on_xpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="xpu")


if __name__ == "__main__":
    sys.exit(main())
