"""Weights, activations and routings that kernels are tried on. Made from seeds, on the CPU, with torch alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from halfbyte.formats import Format
from halfbyte.matrix import Matrix
from halfbyte.problems import InputScales
from halfbyte.schemes import Scheme
from halfbyte.weights import ExpertsWeights, LinearWeights

WeightKind: TypeAlias = Literal["random", "zero-groups", "extreme-scales"]
ActivationKind: TypeAlias = Literal["random", "outliers", "zeros"]
Routing: TypeAlias = Literal["random", "one-expert", "few-experts"]

#: max|x| that input global scales are calibrated to: outliers are beyond it and saturate.
CALIBRATED_AMAX: Final = 5.7
#: The root mean square of the 16 E2M1 numbers.
_E2M1_RMS: Final = 2.926
_E4M3_MAX_CODE: Final = 0x7E
#: Exponents of E8M0 scales at which weights, and sums of a few hundred products, stay finite and normal.
_E8M0_RANGE: Final = {torch.float16: (-8, 6), torch.bfloat16: (-100, 100), torch.float32: (-100, 100)}
_CAPTURED: Final = Path(__file__).with_name("captured.safetensors")


def matrix(
    fmt: Format,
    n: int,
    k: int,
    *,
    seed: int,
    dtype: torch.dtype,
    kind: WeightKind = "random",
    experts: int | None = None,
    bias: bool = False,
    input_scale: bool = False,
    part_rows: tuple[int, ...] = (),
) -> Matrix:
    """Return a matrix [n, k], or a stack of `experts` of them, whose products with unit activations are about 1.

    Every 4-bit code occurs. Global scales are reciprocals of float32 divisors, and differ between parts and experts.
    With `kind` "extreme-scales" the products are as large and as small as `dtype` holds.
    """
    generator = torch.Generator().manual_seed(seed)
    lead = (n,) if experts is None else (experts, n)
    groups = (*lead, k // fmt.group_size)
    packed = torch.randint(0, 256, (*lead, k // 2), generator=generator, dtype=torch.int32).to(torch.uint8)
    codes = (
        _extreme_codes(fmt, groups, dtype, generator) if kind == "extreme-scales" else _codes(fmt, groups, k, generator)
    )
    if kind == "zero-groups":
        empty = torch.rand(groups, generator=generator) < 0.25
        packed[empty.repeat_interleave(fmt.group_size // 2, dim=-1)] = 0
        if fmt.scale == "e4m3":
            codes[empty & (torch.rand(groups, generator=generator) < 0.5)] = 0
    count = experts or max(1, len(part_rows))
    size = 0.125 if kind == "extreme-scales" else 1 / (1.3 * _E2M1_RMS * math.sqrt(k))
    return Matrix(
        name=f"conformance.{kind}",
        format=fmt,
        packed=packed,
        scales=codes.view(torch.float8_e4m3fn) if fmt.scale == "e4m3" else codes,
        global_scale=_global_scales(count, size, generator) if fmt.has_global_scale else None,
        input_global_scale=(
            _global_scales(count, CALIBRATED_AMAX / 2688, generator) if input_scale and fmt.has_global_scale else None
        ),
        bias=torch.randn(lead, generator=generator).to(dtype) if bias else None,
        part_rows=part_rows,
    )


def linear_weights(
    scheme: Scheme,
    n: int,
    k: int,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    kind: WeightKind = "random",
    bias: bool = False,
    part_rows: tuple[int, ...] = (),
) -> LinearWeights:
    """Return the weights of a linear layer [n, k]; a scheme that quantizes activations gets an input global scale."""
    values = matrix(
        scheme.weights,
        n,
        k,
        seed=seed,
        dtype=dtype,
        kind=kind,
        bias=bias,
        input_scale=scheme.activations is not None,
        part_rows=part_rows,
    )
    return LinearWeights(scheme=scheme, matrix=values)


def experts_weights(
    scheme: Scheme,
    experts: int,
    hidden: int,
    intermediate: int,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    kind: WeightKind = "random",
    gated: bool = True,
    bias: bool = False,
    shared: bool = False,
    input_scales: InputScales = "per-expert",
) -> ExpertsWeights:
    """Return the weights of experts: gate and up [E, I, H], down [E, H, I]; no gate unless `gated`.

    Gate and up have different global scales, unless one is to be `shared` by both. Input scales, where the scheme has
    any, are shared by the experts that `input_scales` names and differ otherwise.
    """

    def stack(rows: int, columns: int, place: int) -> Matrix:
        return matrix(
            scheme.weights,
            rows,
            columns,
            seed=3 * seed + place,
            dtype=dtype,
            kind=kind,
            experts=experts,
            bias=bias,
            input_scale=scheme.activations is not None,
        )

    gate, up, down = stack(intermediate, hidden, 0), stack(intermediate, hidden, 1), stack(hidden, intermediate, 2)
    if shared:
        gate = replace(gate, global_scale=up.global_scale, input_global_scale=up.input_global_scale)
    if input_scales != "per-expert":
        gate, up = (_with_input_scale_of(matrix, up) for matrix in (gate, up))
    if input_scales == "one":
        down = _with_input_scale_of(down, down)
    return ExpertsWeights(scheme=scheme, gate=gate if gated else None, up=up, down=down)


def _with_input_scale_of(stack: Matrix, other: Matrix) -> Matrix:
    """The stack with the input scale of another's first expert for all of its own."""
    scales = other.input_global_scale
    return replace(stack, input_global_scale=None if scales is None else scales[:1].expand_as(scales).clone())


def activations(m: int, k: int, dtype: torch.dtype, *, seed: int = 0, kind: ActivationKind = "random") -> Tensor:
    """Return x [m, k] in `dtype`, of about unit size.

    "outliers": a few channels are 50 times larger. "zeros": whole rows and whole groups of 16 and 32 are zero.
    """
    generator = torch.Generator().manual_seed(10_000 + seed)
    x = torch.randn(m, k, generator=generator)
    if kind == "outliers":
        x[:, ::37] *= 50
    elif kind == "zeros":
        x[::3] = 0
        x[:, : k // 2] = 0
    return x.to(dtype)


def routing(tokens: int, experts: int, top_k: int, *, seed: int = 0, kind: Routing = "random") -> tuple[Tensor, Tensor]:
    """Return topk_ids int32 [tokens, top_k], different within a token, and topk_weights float32 [tokens, top_k].

    "one-expert": every token goes to the last expert (and its neighbours). "few-experts": the first half has no token.
    """
    generator = torch.Generator().manual_seed(20_000 + seed)
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "one-expert":
        scores = torch.arange(experts, dtype=torch.float32).expand(tokens, experts)
    elif kind == "few-experts":
        scores[:, : min(experts // 2, experts - top_k)] = -1
    weights, ids = scores.topk(top_k, dim=-1)
    return ids.to(torch.int32), (weights.abs() + 0.1).softmax(-1)


def captured(scheme: Scheme) -> tuple[LinearWeights, Tensor]:
    """Return 96 rows of a trained layer's weights, and the inputs that it saw: bfloat16 [32, 256].

    From the up projection in the third layer of a small Llama trained on Python source; quantized by llmcompressor.
    """
    tensors = _captured()
    fmt = scheme.weights
    scales = tensors[f"{fmt}.scales"]
    global_scale = tensors["nvfp4.divisor"].double().reciprocal() if fmt.has_global_scale else None
    calibrated = tensors["nvfp4.input_divisor"].double().reciprocal()
    values = Matrix(
        name="conformance.captured",
        format=fmt,
        packed=tensors[f"{fmt}.packed"].clone(),
        scales=scales.view(torch.float8_e4m3fn).clone() if fmt.scale == "e4m3" else scales.clone(),
        global_scale=global_scale,
        input_global_scale=calibrated if scheme.activations is not None and fmt.has_global_scale else None,
    )
    return LinearWeights(scheme=scheme, matrix=values), tensors["inputs"].clone()


@cache
def _captured() -> dict[str, Tensor]:
    return load_file(_CAPTURED)


def _global_scales(count: int, size: float, generator: torch.Generator) -> Tensor:
    """Float64 [count] multipliers around `size`: no two alike, none a power of two."""
    spread = 0.7 + 0.6 * torch.rand(count, generator=generator)
    return (1 / (size * spread)).to(torch.float32).double().reciprocal()


def _codes(fmt: Format, shape: tuple[int, ...], k: int, generator: torch.Generator) -> Tensor:
    """Scale codes: E4M3 numbers from 0.5 to 2, or four neighbouring powers of two around 1 / sqrt(k)."""
    if fmt.scale == "e4m3":
        low, high = 0x30, 0x41
    else:
        low = 125 - round(math.log2(_E2M1_RMS * math.sqrt(k)))
        high = low + 4
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(torch.uint8)


def _extreme_codes(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows in turn with the largest scale, the smallest one, and all scales between them in one row."""
    low, high = 0x01, _E4M3_MAX_CODE
    if fmt.scale == "e8m0":
        low, high = (127 + exponent for exponent in _E8M0_RANGE[dtype])
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)
    codes[..., 0::3, :] = high
    codes[..., 1::3, :] = low
    return codes.to(torch.uint8)
