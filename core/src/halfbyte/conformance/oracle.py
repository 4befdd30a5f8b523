"""What a kernel should compute, in float64, by formulas of its own: nothing of halfbyte.numerics is used here.

E2M1, E4M3 and E8M0 are decoded by their definitions (OCP Microscaling Formats v1.0, section 5; OCP FP8 for E4M3),
activations are quantized to the nearest E2M1 number by the scale rules that `halfbyte.specs.Rounding` names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.formats import E2M1_MAX, E2M1_VALUES, E4M3_MAX, Format
from halfbyte.matrix import Matrix
from halfbyte.specs import KernelSpec, Rounding
from halfbyte.weights import ExpertsWeights, LinearWeights


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What should come out, and the scale that an error at each place is measured by: both float64 [M, N]."""

    values: Tensor
    scale: Tensor


def rounding_of(spec: KernelSpec, scheme: str) -> Rounding | None:
    """How the kernel quantizes activations when it runs this scheme; None where it leaves them as they are."""
    return (spec.activation_rounding or Rounding()) if spec.quantizes(scheme) else None


def dequantize(matrix: Matrix) -> Tensor:
    """Return the values [..., N, K] of a matrix."""
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64)
    packed = matrix.packed
    codes = torch.stack((packed % 16, packed // 16), dim=-1).flatten(-2).long()
    values = table.to(packed.device)[codes]
    scales = decode_scales(matrix.scales.view(torch.uint8), matrix.format)
    values = values * scales.repeat_interleave(matrix.format.group_size, dim=-1)
    if matrix.global_scale is None:
        return values
    if packed.ndim == 3:
        return values * matrix.global_scale.to(packed.device)[:, None, None]
    rows = torch.tensor(matrix.part_rows or (matrix.n,))
    return values * matrix.global_scale.repeat_interleave(rows).to(packed.device)[:, None]


def decode_scales(codes: Tensor, fmt: Format) -> Tensor:
    """Return the numbers that scale codes (uint8) stand for."""
    number = codes.double()
    if fmt.scale == "e8m0":
        return torch.exp2(number - 127)
    exponent, mantissa = torch.floor(number / 8), number % 8
    return torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * torch.exp2(exponent - 7))


def quantized(x: Tensor, fmt: Format, global_scale: float | None, rounding: Rounding) -> Tensor:
    """Return x [..., K] as its quantized values are, float64.

    NVFP4: the scale is E4M3(divisor * (amax / 6)) in float32 as compressed-tensors has it, 0.125 where that is zero.
    Without a calibrated global scale it is the rounding's, and if that has none amax / (448 * 6) of all of x.
    """
    global_scale = rounding.input_scale if global_scale is None else global_scale
    group = fmt.group_size
    groups = x.double().reshape(*x.shape[:-1], x.shape[-1] // group, group)
    amax = groups.abs().amax(-1, keepdim=True)
    scale = _nvfp4_scale(amax, global_scale) if fmt.has_global_scale else _mxfp4_scale(amax, rounding)
    return (_nearest_e2m1(groups / scale, rounding.ties) * scale).flatten(-2)


def linear(x: Tensor, weights: LinearWeights, rounding: Rounding | None) -> Expected:
    """Return x [M, K] @ W.T + bias, activations quantized if there is a rounding."""
    matrix = weights.matrix
    results = []
    for part in matrix.parts():
        inputs = _inputs(x, part, rounding)
        weight = dequantize(part)
        values = inputs @ weight.T
        # The size that independent errors of the products add up to, and the size of the result itself.
        scale = (inputs.square() @ weight.T.square()).sqrt()
        if part.bias is not None:
            values, scale = values + part.bias.double(), scale + part.bias.double().abs()
        results.append((values, scale + values.abs()))
    return Expected(*(torch.cat(both, dim=-1) for both in zip(*results, strict=True)))


def experts(
    x: Tensor,
    weights: ExpertsWeights,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str,
    rounding: Rounding | None,
    expert_map: Tensor | None = None,
) -> Expected:
    """Return the weighted sum over each token's local experts; the scale is the size of the token's row."""
    ids = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
    values = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(weights.up.packed.shape[0]):
        token, place = (ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate, up, down = (
            None if matrix is None else _one(matrix, expert) for matrix in (weights.gate, weights.up, weights.down)
        )
        rows = x[token]
        first = None if gate is None else linear(rows, gate, rounding).values
        hidden = activate(activation, first, linear(rows, up, rounding).values)  # type: ignore[arg-type]  # up is there
        result = linear(hidden, down, rounding).values  # type: ignore[arg-type]  # and down
        values.index_add_(0, token, result * topk_weights[token, place].double()[:, None])
    size = values.square().mean(-1, keepdim=True).sqrt()
    return Expected(values, size + values.abs())


def activate(activation: str, gate: Tensor | None, up: Tensor) -> Tensor:
    """Return the input of the down projection, by the formulas of the papers and of gpt-oss (alpha 1.702, limit 7)."""
    if gate is None:
        return up.clamp(min=0) ** 2
    if activation == "silu":
        return up * gate / (1 + torch.exp(-gate))
    if activation == "gelu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return up * 0.5 * gate * (1 + torch.tanh(inner))
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))


def _inputs(x: Tensor, matrix: Matrix, rounding: Rounding | None) -> Tensor:
    if rounding is None:
        return x.double()
    scale = None if matrix.input_global_scale is None else matrix.input_global_scale.item()
    return quantized(x, matrix.format, scale, rounding)


def _one(stack: Matrix, expert: int) -> LinearWeights:
    """One expert of a stack, as a linear layer; its scheme is of no account here."""
    from halfbyte.schemes import Scheme

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[expert : expert + 1]

    matrix = Matrix(
        name=stack.name,
        format=stack.format,
        packed=stack.packed[expert],
        scales=stack.scales[expert],
        global_scale=of(stack.global_scale),
        input_global_scale=of(stack.input_global_scale),
        bias=None if stack.bias is None else stack.bias[expert],
    )
    return LinearWeights(scheme=Scheme(stack.format), matrix=matrix)


def _nvfp4_scale(amax: Tensor, global_scale: float | None) -> Tensor:
    if global_scale is None:
        global_scale = ((amax.max().item() if amax.numel() else 0.0) or 1.0) / (E4M3_MAX * E2M1_MAX)
    divisor = torch.tensor(1 / global_scale, dtype=torch.float32, device=amax.device)
    wanted = divisor * (amax.float() / E2M1_MAX)
    rounded = wanted.clamp(max=E4M3_MAX).cpu().to(torch.float8_e4m3fn).to(amax.device, torch.float64)
    return torch.where(rounded == 0, 0.125, rounded) * global_scale


def _mxfp4_scale(amax: Tensor, rounding: Rounding) -> Tensor:
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2**exponent, mantissa in [0.5, 1)
    up = {"floor": mantissa >= 1, "ceil": mantissa > E2M1_MAX / 8, "even": mantissa >= 0.875}[rounding.scale]
    power = (exponent - 3 + up.to(exponent.dtype)).clamp(min=-127)
    return torch.exp2(power.double())


def _nearest_e2m1(values: Tensor, ties: str) -> Tensor:
    table = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=values.device)
    size = values.abs().clamp(max=E2M1_MAX)
    low = (torch.searchsorted(table, size, right=True) - 1).clamp(max=len(table) - 2)
    below, above = size - table[low], table[low + 1] - size
    up = (above < below) | ((above == below) & (low % 2 == 1) & (ties == "even"))
    return table[low + up.long()] * values.sign()
