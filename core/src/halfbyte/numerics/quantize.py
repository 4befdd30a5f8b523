"""Quantize, dequantize, and both in one: whole tensors in NVFP4 or MXFP4, in groups along the last dimension.

All arithmetic is in float32. A global scale is always the multiplier (x is about e2m1 * scale * global_scale) and
broadcasts to the leading dimensions: a scalar or [1] for one, [N] for one of each row of [N, K], [E, 1] for one of
each expert of [E, N, K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats import Format
from halfbyte.numerics import e2m1
from halfbyte.numerics.global_scales import GlobalScale, GlobalScaleLike, prepared
from halfbyte.numerics.scales import E8M0_NAN, decode_e8m0, mxfp4_scale, nvfp4_scale, scale_codes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_NAMES = "float32, bfloat16, float16"


def quantize(
    x: Tensor,
    format: Format,  # noqa: A002 - the word of this project
    *,
    global_scale: GlobalScaleLike | None = None,
    scale_rule: str = "even",
    ties: str = "even",
) -> tuple[Tensor, Tensor]:
    """Quantize x [..., K] (float32, bfloat16 or float16) to packed values and scales as checkpoints hold them.

    Returns uint8 [..., K/2] and scales [..., K/group]: float8_e4m3fn for NVFP4, E8M0 as uint8 for MXFP4. NVFP4 needs
    a global scale (see `global_scale_for`), MXFP4 has none and takes `scale_rule` (see `mxfp4_scale`). `ties` is as in
    `e2m1.encode`. NaN makes its whole group NaN, by the scale; infinity does so in MXFP4 and saturates in NVFP4.
    Raises UsageError for another dtype, a K that is not a multiple of the group, or an unknown rule.
    """
    codes, scales, _ = _quantize(x, format, global_scale, scale_rule, ties)
    packed = e2m1.pack(codes.flatten(-2))
    return packed, scales.view(torch.float8_e4m3fn) if format.scale == "e4m3" else scales


def dequantize(
    packed: Tensor,
    scales: Tensor,
    format: Format,  # noqa: A002 - the word of this project
    *,
    global_scale: GlobalScaleLike | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the values [..., K] in `dtype` of packed values (uint8 [..., K/2]) and scales [..., K/group].

    Scales are uint8 codes or the format's 8-bit float dtype. The result is e2m1 * float32(scale * global_scale),
    rounded to float32 and then to `dtype`: bit for bit what compressed-tensors computes in float32 when the global
    scale is the float64 reciprocal of its divisor. Raises UsageError for shapes that do not belong together.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"cannot dequantize to {dtype}; choose one of {_DTYPE_NAMES}")
    k = packed.shape[-1] * 2 if packed.ndim else 0
    expected = (*packed.shape[:-1], k // format.group_size)
    if packed.ndim == 0 or k % format.group_size or tuple(scales.shape) != expected:
        raise UsageError(
            f"packed values {list(packed.shape)} (K={k}) and scales {list(scales.shape)} do not belong together: "
            f"{format} has one scale for {format.group_size} values, {format.group_size // 2} bytes"
        )
    codes = scale_codes(scales, format)
    ready = _global_scale(global_scale, format, packed)
    effective = decode_e8m0(codes) if ready is None else ready.times(codes)
    values = _grouped(e2m1.decode_packed(packed), format)
    return (values * effective.unsqueeze(-1)).flatten(-2).to(dtype)


def fake_quantize(
    x: Tensor,
    format: Format,  # noqa: A002 - the word of this project
    *,
    global_scale: GlobalScaleLike | None = None,
    scale_rule: str = "even",
    ties: str = "even",
) -> Tensor:
    """Quantize and dequantize x [..., K] in float32; same shape, rounded to x's dtype at the end.

    Equals compressed-tensors' forward_quantize bit for bit in float32 (scale_rule and ties "even"), and for MXFP4 in
    bfloat16; in NVFP4 with bfloat16 activations that library also does the scale arithmetic in bfloat16, and differs.
    The one exception is an MXFP4 group with NaN in it, for which that library has no one answer; here it is all NaN.
    A float16 result may be infinite: the values next to 65504 round up. Errors are those of `quantize`.
    """
    codes, _, effective = _quantize(x, format, global_scale, scale_rule, ties)
    return (e2m1.decode(codes) * effective.unsqueeze(-1)).flatten(-2).to(x.dtype)


def _quantize(
    x: Tensor, fmt: Format, global_scale: GlobalScaleLike | None, scale_rule: str, ties: str
) -> tuple[Tensor, Tensor, Tensor]:
    """E2M1 codes [..., K/group, group], scale codes (uint8) and the scales' values in float32 [..., K/group]."""
    if x.dtype not in _DTYPES:
        raise UsageError(f"cannot quantize {x.dtype} {list(x.shape)}; convert it to one of {_DTYPE_NAMES}")
    ready = _global_scale(global_scale, fmt, x)
    groups = _grouped(x, fmt).to(torch.float32)
    amax = groups.abs().amax(-1)
    if ready is None:
        scales = mxfp4_scale(amax, scale_rule)
        effective = decode_e8m0(scales)
        # Times the exact reciprocal: no division by a number that a device may flush to zero. NaN's code (255) is its
        # own partner, since uint8 wraps.
        ratio = groups * decode_e8m0(E8M0_NAN - 1 - scales).unsqueeze(-1)
    else:
        scales = nvfp4_scale(amax, ready.divisor.unsqueeze(-1))
        effective = ready.times(scales)
        ratio = groups / effective.unsqueeze(-1)
    return e2m1.encode(ratio, ties), scales, effective


def _grouped(x: Tensor, fmt: Format) -> Tensor:
    """[..., K] as [..., K/group, group]."""
    group = fmt.group_size
    if x.ndim == 0 or x.shape[-1] % group:
        raise UsageError(f"the last dimension of {list(x.shape)} is not a multiple of {fmt}'s group of {group}; pad it")
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _global_scale(global_scale: GlobalScaleLike | None, fmt: Format, tensor: Tensor) -> GlobalScale | None:
    """The global scale on the tensor's device, or None for a format without one; its shape must broadcast."""
    if fmt.has_global_scale != (global_scale is not None):
        fault = "needs a global scale (1.0 if there is none)" if global_scale is None else "has no global scale"
        raise UsageError(f"{fmt} {fault}")
    if global_scale is None:
        return None
    ready = prepared(global_scale, tensor.device)
    if ready.divisor.numel() == 1:
        return GlobalScale(ready.divisor.reshape(()), ready.table.reshape(256))
    shape, lead = tuple(ready.divisor.shape), tuple(tensor.shape[:-1])
    fits = all(size in (1, of) for size, of in zip(reversed(shape), reversed(lead), strict=False))
    if len(shape) > len(lead) or not fits:
        raise UsageError(f"a global scale {list(shape)} does not broadcast to the leading dimensions {list(lead)}")
    return ready
