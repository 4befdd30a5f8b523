"""xpu.scaled-mm: MXFP4 and NVFP4 weights and activations by torch.nn.functional.scaled_mm, torch 2.14 and newer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from halfbyte.kernels import Packed
from halfbyte.numerics import GlobalScale, quantize
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_xpu.torch_xpu.packing import pack_linear


class ScaledMm:
    """Quantizes activations by torch operations at each call, exactly as the built-in kernels do."""

    def prepare(self, weights: LinearWeights, problem: LinearProblem) -> dict[str, Tensor]:
        """Return `weight`, `scales` and global scales; see packing.py."""
        return pack_linear(weights.matrix, problem.scheme)

    def apply(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:  # noqa: ARG002 - core adds the bias
        """Return y [M, n] in x's dtype. Bias is left to core: oneDNN might multiply it by the global scales."""
        fmt = packed.problem.scheme.weights
        nvfp4 = fmt.has_global_scale
        global_scale = GlobalScale(packed["x_input_divisor"], packed["x_input_table"]) if nvfp4 else None
        values, scales = quantize(x, fmt, global_scale=global_scale)
        kind = torch.float8_e4m3fn if nvfp4 else torch.float8_e8m0fnu
        recipes = [ScalingType.BlockWise1x16 if nvfp4 else ScalingType.BlockWise1x32]
        x_scales, weight_scales = [scales.view(kind)], [packed["scales"].view(kind)]
        if nvfp4:
            recipes.append(ScalingType.TensorWise)
            x_scales.append(packed["x_global_scale"])
            weight_scales.append(packed["global_scale"])
        swizzles = [SwizzleType.NO_SWIZZLE] * len(recipes)
        return F.scaled_mm(
            values.view(torch.float4_e2m1fn_x2),
            packed["weight"].view(torch.float4_e2m1fn_x2).t(),
            x_scales,
            recipes,
            weight_scales,
            recipes,
            swizzle_a=swizzles,
            swizzle_b=swizzles,
            output_dtype=x.dtype,
        )
