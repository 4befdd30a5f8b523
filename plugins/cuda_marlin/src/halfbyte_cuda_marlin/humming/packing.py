"""Canonical weights in humming's layout, padded with zero codes to what its tiles need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.formats import Format
from halfbyte.matrix import SCALE_DTYPES, Matrix
from halfbyte.problems import round_up
from halfbyte_cuda_marlin.humming.library import library, told
from halfbyte_cuda_marlin.humming.specs import MULTIPLE


@dataclass(frozen=True, slots=True)
class Gemm:
    """A product y [M, n] = x [M, k] @ W.T, or one for each of several experts, as humming compiles it."""

    n: int
    k: int
    format: Format
    #: "bfloat16" or "float16"
    dtype: str
    #: 0: one matrix, not a stack.
    experts: int = 0
    bias: bool = False

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of the packed matrix."""
        return round_up(self.n, MULTIPLE), round_up(self.k, MULTIPLE)

    def layer(self) -> Any:
        """The same as humming's LayerConfig on the current device. Activations have 16 bits, whatever its defaults."""
        n, k = self.padded
        return library().LayerConfig(
            shape_n=n,
            shape_k=k,
            pad_shape_n=n - self.n,
            pad_shape_k=k - self.k,
            num_experts=self.experts,
            a_dtype=self.dtype,
            b_dtype="float4e2m1",
            c_dtype=self.dtype,
            bs_dtype="float8e4m3" if self.format.scale == "e4m3" else "float8e8m0",
            weight_scale_group_size=self.format.group_size,
            weight_scale_type="group",
            # MXFP4 has none, but without one the last power of two is multiplied in 16 bits.
            weight_scale_2_type="tensor",
            has_bias=self.bias,
        )


def pack(matrix: Matrix, gemm: Gemm) -> dict[str, Tensor]:
    """Rearrange a matrix [n, k] or a stack [E, n, k] on its device.

    weight: int32 [..., K/16, N*2]; weight_scale: uint8 [..., K/group, N]; weight_scale_2: float32 [1 or E], what each
    matrix's result is multiplied by; bias: the activations' dtype [..., N], if there is one. N and K are padded.
    PluginError if humming fails.
    """
    n, k = gemm.padded
    count, device = gemm.experts or 1, matrix.packed.device
    scales = matrix.scales.view(torch.uint8)
    tensors = {
        "weight": _padded(matrix.packed, n, k // 2).view(torch.int32),
        "weight_scale": _padded(scales, n, k // matrix.format.group_size).view(_scale_dtype(matrix.format)),
        "weight_scale_2": _global_scales(matrix, count).to(device),
    }
    if matrix.bias is not None and gemm.bias:
        tensors["bias"] = F.pad(matrix.bias.to(getattr(torch, gemm.dtype)), (0, n - gemm.n))
    with torch.cuda.device_of(matrix.packed), told(f"pack {matrix.name}"):
        # Without these powers of two E8M0 scales outside of float16's range would become zero or infinite.
        layer, tensors = library().fit_fp16_scales(gemm.layer(), tensors)
        packed = library().transform(layer, tensors, already_padded=True)
    return packed | {"weight_scale": packed["weight_scale"].view(torch.uint8)}


def arguments(packed: Mapping[str, Tensor], fmt: Format) -> dict[str, Tensor]:
    """The packed tensors as humming's launcher takes them."""
    return {**packed, "weight_scale": packed["weight_scale"].view(_scale_dtype(fmt))}


def _scale_dtype(fmt: Format) -> torch.dtype:
    return SCALE_DTYPES["e4m3"] if fmt.scale == "e4m3" else torch.float8_e8m0fnu


def _padded(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """Bytes with zeros appended up to [..., rows, columns]; contiguous."""
    return F.pad(tensor, (0, columns - tensor.shape[-1], 0, rows - tensor.shape[-2])).contiguous()


def _global_scales(matrix: Matrix, count: int) -> Tensor:
    """Float32 [count]; ones for MXFP4. float64 multipliers keep 24 bits, as the kernels multiply in float32."""
    return torch.ones(count) if matrix.global_scale is None else matrix.global_scale.float()
