"""How far a kernel may be from the oracle: one table for all kernels, which no declaration can loosen.

Two measures, so that neither a small error everywhere nor a large one at a single place passes:

- `mean`: the root mean square over all places of |y - expected| / scale, a Frobenius norm in which every row counts;
- `worst`: the largest |y - expected| / scale.

The scale of a place is the size of the result there, plus the size that independent errors of its products add up to
(linear) or the size of the token's row (experts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from halfbyte.conformance.oracle import Expected


@dataclass(frozen=True, slots=True)
class Errors:
    """Measured, or allowed at most."""

    mean: float
    worst: float

    def within(self, allowed: Errors) -> bool:
        """Whether both are within what is allowed; NaN is not."""
        return self.mean <= allowed.mean and self.worst <= allowed.worst


# One rounding to bfloat16 is at most 2**-9 = 2e-3 of the value and 1.1e-3 in the mean, to float16 an eighth of that.
# A linear kernel may round each weight, each activation and the result, and in the worst of 100,000 places such errors
# are 4.5 times their mean. float32 allows sums in any order, but no TF32 (5e-4).
_LINEAR: Final = {
    "float32": Errors(5e-6, 3e-5),
    "bfloat16": Errors(3e-3, 1.5e-2),
    "float16": Errors(4e-4, 2e-3),
}
# NVFP4 activations: E4M3 scales are rounded quotients, and an approximate reciprocal moves one in very many of them to
# the neighbouring number. That changes a group by 6 %. MXFP4's scales are powers of two, exact in any arithmetic.
_LINEAR_NVFP4_ACTIVATIONS: Final = dict.fromkeys(_LINEAR, Errors(1e-2, 1e-1))
# Experts: gate, up, their product, the down projection and the weighted sum may each be rounded.
_EXPERTS: Final = {
    "float32": Errors(1e-5, 1e-4),
    "bfloat16": Errors(8e-3, 5e-2),
    "float16": Errors(1e-3, 7e-3),
}
# With quantized activations the input of the down projection is rounded to E2M1, and where the roundings before moved a
# number across the middle between two E2M1 numbers, it changes by a quarter or more: in bfloat16 about one number in a
# hundred, in float16 one in a thousand, in float32 hardly any. Where that number is the largest of its MXFP4 group,
# the scale of all 32 doubles. A token with the wrong experts is further away than all of these.
_EXPERTS_QUANTIZED: Final = {
    ("nvfp4", "float32"): Errors(5e-3, 1e-1),
    ("nvfp4", "bfloat16"): Errors(6e-2, 6e-1),
    ("nvfp4", "float16"): Errors(2.5e-2, 4e-1),
    ("mxfp4", "float32"): Errors(5e-3, 1e-1),
    ("mxfp4", "bfloat16"): Errors(1.5e-1, 1.0),
    ("mxfp4", "float16"): Errors(4e-2, 8e-1),
}


def tolerance(op: str, weight_format: str, dtype: str, *, quantizes: bool) -> Errors:
    """The errors allowed for an op with weights in a format, activations in a dtype and quantized or not."""
    if op == "experts":
        return _EXPERTS_QUANTIZED[weight_format, dtype] if quantizes else _EXPERTS[dtype]
    if quantizes and weight_format == "nvfp4":
        return _LINEAR_NVFP4_ACTIVATIONS[dtype]
    return _LINEAR[dtype]


def errors(actual: Tensor, expected: Expected) -> Errors:
    """Measure a result; infinite where something should be zero and is not, NaN where it is NaN."""
    if not actual.numel():
        return Errors(0.0, 0.0)
    difference = (actual.double() - expected.values).abs()
    relative = torch.where(difference == 0, 0.0, difference / expected.scale)
    return Errors(relative.square().mean().sqrt().item(), relative.max().item())
