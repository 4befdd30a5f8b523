"""Custom operators of ours around FlashInfer's calls: opaque to the compiler, with fakes that share the checks.

The checks are made before the library is asked. Its quantizers do not look at the card at all: before Blackwell they
return memory that was never written. Its products take scales of any shape and misread the wrong ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import flashinfer
import flashinfer.utils
import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.formats import MXFP4, NVFP4, Format
from halfbyte_cuda_blackwell.backends import BACKENDS, WEIGHT_ONLY, WEIGHT_ONLY_MULTIPLE
from halfbyte_cuda_blackwell.packing import padded_scale_shape

#: The first capability whose instructions know FP4.
FIRST_WITH_FP4 = 100
#: What the kernels' bulk copies ask of addresses.
_ALIGNMENT = 32
#: Instead of the rows of a tile: scales as they are, not swizzled.
LINEAR = 0


def capability_of(device: torch.device) -> int:
    """The device's CUDA compute capability as one number, such as 100; UsageError for another kind of device."""
    try:
        major, minor = flashinfer.utils.get_compute_capability(device)
    except ValueError as error:
        raise UsageError(f"FlashInfer runs on CUDA cards; the tensors are on {device}") from error
    return int(major * 10 + minor)


def require_capability(device: torch.device, allowed: Iterable[int], what: str) -> int:
    """The device's capability; UsageError naming it and what is allowed unless it is one of these."""
    found, known = capability_of(device), tuple(allowed)
    if found not in known:
        names = ", ".join(f"sm_{capability}" for capability in known)
        raise UsageError(f"{what} runs on {names}; {device} is sm_{found}. Use a kernel for this card")
    return found


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a card the current one for a while: FlashInfer launches on the current one, whatever its tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it if it starts at an address that the kernels do not take."""
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


@torch.library.custom_op("halfbyte_cuda_blackwell::quantize", mutates_args=())
def quantize(x: Tensor, encode: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """Quantize x [M, K] (bfloat16 or float16): uint8 [M, K/2], and its scales as uint8.

    NVFP4 with `encode` float32 [1], what x is multiplied by (2688 / amax); MXFP4 without, the scale rounded up. The
    scales are [round_up(M, tile), round_up(K/group, 4)], swizzled in tiles of 128 x 4 or 8 x 4, or with LINEAR
    [M, K/group]. UsageError for other shapes, dtypes and for cards before Blackwell.
    """
    fmt = _check_quantize(x, encode, tile)
    rows = x.view(-1).view(x.shape)  # one row may have any stride, and (1, 1) is taken for column-major
    with current(x.device):
        codes, scales = flashinfer.fp4_quantize(
            aligned(rows),
            encode,
            sf_vec_size=fmt.group_size,
            sf_use_ue8m0=not fmt.has_global_scale,
            is_sf_swizzled_layout=tile != LINEAR,
            is_sf_8x4_layout=tile == 8,
            is_global_scale_inversed=False,
            backend="cuda",
            nvfp4_4over6=None,
        )
    return codes, scales.view(torch.uint8).view(_scale_shape(x, fmt, tile))


@quantize.register_fake
def _quantize_fake(x: Tensor, encode: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    fmt = _check_quantize(x, encode, tile)
    m, k = x.shape
    scales = _scale_shape(x, fmt, tile)
    return x.new_empty(m, k // 2, dtype=torch.uint8), x.new_empty(scales, dtype=torch.uint8)


def _scale_shape(x: Tensor, fmt: Format, tile: int) -> tuple[int, int]:
    rows, columns = x.shape[0], x.shape[1] // fmt.group_size
    return (rows, columns) if tile == LINEAR else padded_scale_shape(rows, columns, tile)


@torch.library.custom_op("halfbyte_cuda_blackwell::mm_fp4", mutates_args=())
def mm_fp4(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    alpha: Tensor,
    backend: str,
    group: int,
    tile: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return alpha * a @ weight.T [M, N] in `dtype`, of codes [M, K/2] and [N, K/2] with swizzled scales.

    `alpha` is float32 [1]; `group` is 16 (NVFP4) or 32 (MXFP4); `tile` is that of a's scales. UsageError for anything
    that the back end does not take.
    """
    _check_mm_fp4(a, a_scales, weight, weight_scales, alpha, backend, group, tile, dtype)
    with current(a.device):
        result: Tensor = flashinfer.mm_fp4(
            a,
            weight.T,
            a_scales,
            weight_scales.T,
            alpha,
            out_dtype=dtype,
            block_size=group,
            use_8x4_sf_layout=tile == 8,
            backend=backend,
            use_nvfp4=group == NVFP4.group_size,
        )
    return result


@mm_fp4.register_fake
def _mm_fp4_fake(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    alpha: Tensor,
    backend: str,
    group: int,
    tile: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_mm_fp4(a, a_scales, weight, weight_scales, alpha, backend, group, tile, dtype)
    return a.new_empty(a.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("halfbyte_cuda_blackwell::mm_bf16_fp4", mutates_args=())
def mm_bf16_fp4(x: Tensor, weight: Tensor, scales: Tensor, alpha: Tensor, n: int) -> Tensor:
    """Return alpha * x @ W.T, bfloat16 [M, n], with a weight as `weight_only.prepared` packs it for this card.

    UsageError for another x, alpha or card.
    """
    backend = _check_mm_bf16_fp4(x, weight, alpha, n)
    if backend == "cudnn":
        scales = scales.view(torch.float8_e4m3fn)
    elif scales.ndim == 6:  # CuTe DSL on SM10x takes a view of the swizzled bytes; see weight_only.py
        scales = scales.permute(3, 4, 1, 5, 2, 0)
    with current(x.device):
        result: Tensor = flashinfer.mm_bf16_fp4(aligned(x), weight, scales, alpha, backend=backend, out_dtype=x.dtype)
    return result


@mm_bf16_fp4.register_fake
def _mm_bf16_fp4_fake(x: Tensor, weight: Tensor, scales: Tensor, alpha: Tensor, n: int) -> Tensor:  # noqa: ARG001
    _check_mm_bf16_fp4(x, weight, alpha, n)
    return x.new_empty(x.shape[0], n)


def _check_quantize(x: Tensor, encode: Tensor | None, tile: int) -> Format:
    fmt = MXFP4 if encode is None else NVFP4
    found = capability_of(x.device)
    if found < FIRST_WITH_FP4:
        raise UsageError(f"FlashInfer quantizes to FP4 from sm_{FIRST_WITH_FP4} on; {x.device} is sm_{found}")
    dtypes = (torch.bfloat16, torch.float16)
    if x.ndim != 2 or x.dtype not in dtypes or not x.is_contiguous() or x.shape[1] % fmt.group_size:
        raise UsageError(
            f"x is {x.dtype} {list(x.shape)} with strides {list(x.stride())}; {fmt} is quantized from contiguous "
            f"bfloat16 or float16 [M, K] with K a multiple of {fmt.group_size}"
        )
    if encode is not None:
        _check_scalar("encode", encode, x.device)
    if tile not in (LINEAR, 8, 128):
        raise UsageError(f"scales are swizzled in tiles of 8 or 128 rows, or not at all ({LINEAR}); not {tile}")
    return fmt


def _check_mm_fp4(
    a: Tensor,
    a_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    alpha: Tensor,
    backend: str,
    group: int,
    tile: int,
    dtype: torch.dtype,
) -> None:
    own = BACKENDS[backend]
    require_capability(a.device, own.capabilities, f"mm_fp4 with back end {backend}")
    fmt = {16: NVFP4, 32: MXFP4}[group]
    if fmt.name not in own.formats or str(dtype).removeprefix("torch.") not in own.dtypes:
        raise UsageError(
            f"{backend} computes {', '.join(own.formats)} to {', '.join(own.dtypes)}; not {fmt} to {dtype}"
        )
    (m, k_bytes), n = a.shape, weight.shape[0]
    if tile != 128 and not own.small_tiles:
        raise UsageError(f"{backend} reads activation scales in tiles of 128 rows, not {tile}")
    if n % own.n_multiple or k_bytes * 2 % own.k_multiple:
        multiples = f"{own.n_multiple} and {own.k_multiple}"
        raise UsageError(f"N={n}, K={k_bytes * 2}: {backend} needs multiples of {multiples}; pad with zeros")
    columns = k_bytes * 2 // group
    _check_bytes("a", a, (m, k_bytes), a.device)
    _check_bytes("weight", weight, (n, k_bytes), a.device)
    _check_bytes("scales of a", a_scales, padded_scale_shape(m, columns, tile), a.device)
    _check_bytes("scales of the weight", weight_scales, padded_scale_shape(n, columns), a.device)
    _check_scalar("alpha", alpha, a.device)


def _check_mm_bf16_fp4(x: Tensor, weight: Tensor, alpha: Tensor, n: int) -> str:
    capability = require_capability(x.device, WEIGHT_ONLY, "mm_bf16_fp4")
    k = weight.numel() * weight.element_size() * 2 // n
    if x.ndim != 2 or x.dtype != torch.bfloat16 or not x.is_contiguous() or x.shape[1] != k:
        raise UsageError(f"x is {x.dtype} {list(x.shape)}; the weight [{n}, {k}] takes contiguous bfloat16 [M, {k}]")
    if n % WEIGHT_ONLY_MULTIPLE or k % WEIGHT_ONLY_MULTIPLE:
        raise UsageError(f"N={n}, K={k}: mm_bf16_fp4 needs multiples of {WEIGHT_ONLY_MULTIPLE}; pad with zeros")
    _check_scalar("alpha", alpha, x.device)
    return WEIGHT_ONLY[capability]


def _check_bytes(name: str, tensor: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if tensor.dtype == torch.uint8 and tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
        return
    raise UsageError(
        f"{name}: {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}; "
        f"expected contiguous torch.uint8 {list(shape)} on {device}"
    )


def _check_scalar(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype != torch.float32 or tensor.shape != (1,) or tensor.device != device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise UsageError(f"{name} is {found}; it must be torch.float32 [1] on {device}")
