"""Weights as Marlin reads them: codes by vLLM's own repacking operator, scales and biases rearranged here.

NVFP4's scales become bytes of five exponent and three mantissa bits, unsigned. In bfloat16 the kernel drops them into
a wider exponent of which the top bit must be set: it reads 16 powers of two, of the 18 of E4M3. So a matrix's scales
are shifted until the largest is in the highest of the 16. Where that leaves some too small, every row is shifted by
itself, and its results are shifted back by `rows`. In float16 it reads every E4M3 number, and E8M0 scales not at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.matrix import Matrix
from halfbyte_cuda_marlin.vllm.calls import call

#: The kernel reads codes without their exponent's bias: as E2M1 numbers times 2**-126 (bfloat16) or 2**-14 (float16).
_CODE_EXPONENT: Final = {torch.bfloat16: 126, torch.float16: 14}
#: E4M3 numbers times 2**7 are normal in float16; the largest power of two of E5M3 there is 2**15.
_FP16_SHIFT: Final = 7
_FP16_TOP: Final = 15
#: In bfloat16 the scales' powers of two are 2**1 to 2**16.
_BF16_LOW: Final = 1
_BF16_TOP: Final = 16
_FLOAT32_MAX: Final = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """The scales of one matrix [N, K] for activations of one dtype."""

    #: uint8 [groups, N] in the order in which the kernel reads them.
    codes: Tensor
    #: What the kernel multiplies its sums by; None where it takes no such number.
    factor: float | None
    #: In the activations' dtype [N]: what each row's results are to be multiplied by; None where that is 1.
    rows: Tensor | None = None


class Repack:
    """vLLM's operator that brings codes into the order of Marlin's tiles of 16 x 64."""

    def __init__(self, device: torch.device) -> None:
        none = torch.empty(0, dtype=torch.int32, device=device)
        fixed = {"num_bits": 4, "is_a_8bit": False}
        self._call = call("_C::gptq_marlin_repack", ("b_q_weight", "size_k", "size_n"), fixed, {"perm": none})

    def __call__(self, packed: Tensor) -> Tensor:
        """Int32 [K/16, 2N] of uint8 [N, K/2]."""
        n, half = packed.shape
        words: Tensor = self._call(packed.contiguous().view(torch.int32).T.contiguous(), 2 * half, n)
        return words


def pack_matrix(matrix: Matrix, dtype: torch.dtype, repack: Repack) -> dict[str, Tensor]:
    """The tensors that Marlin reads for a matrix [N, K], or a stack of one, and activations of `dtype`.

    `codes` int32 [K/16, 2N], `scales` uint8 [groups, N]; `global_scale` float32 [] and `rows` in `dtype` [N] where
    there are such. CheckpointError if the global scale is beyond what the kernel can multiply by.
    """
    scales = pack_scales(matrix, dtype)
    packed = {"codes": repack(matrix.packed.flatten(0, -2)), "scales": scales.codes}
    if scales.factor is not None:
        packed["global_scale"] = torch.tensor(scales.factor, dtype=torch.float32, device=scales.codes.device)
    if scales.rows is not None:
        packed["rows"] = scales.rows
    return packed


def pack_scales(matrix: Matrix, dtype: torch.dtype) -> Scales:
    """The scales of `pack_matrix`."""
    rows, scales = None, matrix.scales.flatten(0, -2)
    if matrix.format.scale == "e4m3":
        codes, shift, rows = _bf16_codes(scales) if dtype == torch.bfloat16 else (*_fp16_codes(scales), None)
    elif dtype == torch.bfloat16:
        return Scales(_in_reading_order(scales), None)
    else:
        codes, shift = _e5m3_of_e8m0(scales)
    global_scale = 1.0 if matrix.global_scale is None else matrix.global_scale.item()
    factor = math.ldexp(global_scale, _CODE_EXPONENT[dtype] - shift)
    if factor > _FLOAT32_MAX:
        raise CheckpointError(
            f"{matrix.name}: global scale {global_scale:g} is beyond what Marlin's kernel can multiply by in {dtype}; "
            "is it a divisor? If not, deny the kernel for this layer, such as with HALFBYTE_DENY=marlin.vllm"
        )
    return Scales(_in_reading_order(codes), factor, rows)


def scale_view(codes: Tensor, *, e8m0: bool) -> Tensor:
    """The bytes of scales as the dtype by which Marlin's operators tell their formats."""
    return codes.view(torch.float8_e8m0fnu if e8m0 else torch.float8_e4m3fn)


def permuted_bias(bias: Tensor) -> Tensor:
    """A bias [..., N] in the order in which the kernel's threads add it: in each 32 columns, those of a thread."""
    threads = bias.view(*bias.shape[:-1], -1, 4, 4, 2)
    return threads.transpose(-3, -2).reshape(bias.shape)


def _in_reading_order(codes: Tensor) -> Tensor:
    """uint8 [N, groups] to [groups, N]: 8 x 8 columns transposed, then the middle two of each four swapped."""
    lines = codes.T.contiguous()
    n = lines.shape[1]
    threads = lines.view(-1, n // 64, 8, 8).transpose(2, 3)
    return threads.reshape(-1, 2, 2).transpose(1, 2).reshape(lines.shape)


def _bf16_codes(scales: Tensor) -> tuple[Tensor, int, Tensor | None]:
    """(codes [N, groups], the power of two that all scales were multiplied by, rows as in `Scales`)."""
    values = scales.to(torch.float32)
    shift = _BF16_TOP - _exponent(values.max().item())
    values = values * 2.0**shift
    rows = None
    if bool(((values > 0) & (values < 2.0**_BF16_LOW)).any()):
        largest = values.amax(dim=1, keepdim=True)
        up = torch.where(largest > 0, _BF16_TOP + 1 - torch.frexp(largest).exponent, 0)
        values = torch.ldexp(values, up)
        rows = torch.ldexp(torch.ones_like(largest), -up)[:, 0].to(torch.bfloat16)
    # 1 eeee mmm: the low four bits of bfloat16's exponent and the top three of its mantissa. What is too small is
    # rounded to the smallest number or to zero.
    bits = values.clamp(min=2.0**_BF16_LOW).to(torch.bfloat16).view(torch.int16)
    codes = torch.where(values > 2.0 ** (_BF16_LOW - 1), 0x80 | (bits >> 4 & 0x7F), 0)
    return codes.to(torch.uint8), shift, rows


def _fp16_codes(scales: Tensor) -> tuple[Tensor, int]:
    return _top_bits(scales.to(torch.float32) * 2.0**_FP16_SHIFT), _FP16_SHIFT


def _e5m3_of_e8m0(scales: Tensor) -> tuple[Tensor, int]:
    """The same numbers for groups of 16, relative to the largest: what is 2**-25 of it begins to vanish."""
    largest = int(scales.max().item())
    values = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.to(torch.int32) - largest + _FP16_TOP)
    return _top_bits(values).repeat_interleave(2, dim=1), _FP16_TOP - (largest - 127)


def _top_bits(values: Tensor) -> Tensor:
    """Five exponent and three mantissa bits of positive float16 numbers."""
    return (values.to(torch.float16).view(torch.int16) >> 7).to(torch.uint8)


def _exponent(value: float) -> int:
    """The e of 2**e <= value < 2**(e + 1); 0 for 0."""
    return math.frexp(value)[1] - 1 if value else 0
