"""Doubles of fused_moe/cute_dsl/blackwell_sm12x/moe_dispatch.py; scales of activations are multipliers (fp4_common.py).

The weights of W4A16 are prepared by the library's own moe_w4a16_prepare.py, and decoded here.
"""

from __future__ import annotations

import torch
from flashinfer.tllm_enums import ActivationType
from torch import Tensor

from cuda_blackwell.experts_emulator import moe
from cuda_blackwell.experts_emulator.common import activation_of, six_d
from cuda_blackwell.flashinfer_emulator import checks


class B12x:
    """blackwell_sm12x/moe_dispatch.py: what `launch_sm120_moe` does with views that were made once."""

    def __init__(self) -> None:
        self.made: list[tuple[int, ...]] = []

    def weight_views(self, w1_fp4, w1_blockscale, w2_fp4, w2_blockscale, w1_alphas, w2_alphas, n, k, quant_mode):
        checks.multiple(256, n=n)
        checks.multiple(128, k=k)
        checks.dtype(torch.uint8, w1=w1_fp4, w2=w2_fp4)
        checks.dtype(torch.float32, alpha1=w1_alphas, alpha2=w2_alphas)
        # The library's cache is of these tensors, and is emptied when one of them goes.
        key = tuple(id(tensor) for tensor in (w1_fp4, w1_blockscale, w2_fp4, w2_blockscale, w1_alphas, w2_alphas))
        if key not in self.made:
            self.made.append(key)
        group = 32 if quant_mode == "mxfp4" else 16
        first, second = six_d(w1_fp4, w1_blockscale, group), six_d(w2_fp4, w2_blockscale, group)
        return quant_mode, first, second, w1_alphas, w2_alphas

    def launch(
        self,
        *,
        a,
        topk_ids,
        topk_weights,
        w1_alpha,
        w2_alpha,
        num_experts,
        top_k,
        num_local_experts,
        scatter_output,
        activation,
        quant_mode,
        fc2_input_scale=None,
        input_global_scale=None,
        swiglu_alpha=1.702,
        swiglu_beta=1.0,
        swiglu_limit=None,
        _weight_views=None,
        _prepared_weights=None,
        **_unread: Tensor,
    ) -> Tensor:
        checks.dtype(torch.bfloat16, a=a, scatter_output=scatter_output)
        checks.aligned(32, a=a, scatter_output=scatter_output)
        checks.dtype(torch.float32, topk_weights=topk_weights)
        checks.contiguous(a=a, topk_ids=topk_ids, topk_weights=topk_weights)
        if num_local_experts != num_experts or topk_ids.shape[1] != top_k or topk_ids.max() >= num_experts:
            raise RuntimeError(f"{num_experts} experts, {num_local_experts} here, ids up to {int(topk_ids.max())}")
        kind = {"silu": "Swiglu", "gelu_tanh": "GegluTanh", "relu2": "Relu2"}.get(activation, "Swiglu")
        constants = (1.0, 0.0, float("inf"))
        if activation == "swigluoai_uninterleave":
            constants = (swiglu_alpha, swiglu_beta, 7.0 if swiglu_limit is None else swiglu_limit)
        act = activation_of(ActivationType[kind], *constants)
        if quant_mode == "w4a16":
            y = self._a16(a, topk_ids, topk_weights, _prepared_weights, act, activation)
        else:
            mode, first, second, alpha1, alpha2 = _weight_views
            if mode != quant_mode or alpha1 is not w1_alpha or alpha2 is not w2_alpha:
                raise RuntimeError("views of something else")
            quantizers: tuple[moe.Rounding, moe.Rounding] = (moe.mxfp4, moe.mxfp4)
            if mode == "nvfp4":
                checks.dtype(torch.float32, input=input_global_scale, hidden=fc2_input_scale)
                # Multipliers: x is divided by them.
                quantizers = (moe.nvfp4(1 / input_global_scale), moe.nvfp4(1 / fc2_input_scale))
            y = moe.run(
                a,
                topk_ids,
                topk_weights,
                first * alpha1[:, None, None],
                second * alpha2[:, None, None],
                lambda rows, _: act(rows),
                inputs=quantizers[0],
                hidden=quantizers[1],
            )
        return scatter_output.copy_(y)

    @staticmethod
    def _a16(a, ids, weights, prepared, act, activation) -> Tensor:
        if activation not in ("silu", "relu2"):
            raise ValueError(f"unsupported activation {activation!r}")
        if (prepared.source_format, prepared.w13_layout, prepared.weight_layout, prepared.scale_format) != (
            "modelopt",
            "w13",
            "packed",
            "e4m3_k16",
        ):
            raise ValueError(f"unsupported layout of {prepared}")
        checks.dtype(torch.float8_e4m3fn, w13=prepared.w13_scale, w2=prepared.w2_scale)
        hidden, intermediate = prepared.hidden_size, prepared.intermediate_size
        rows = intermediate * (2 if prepared.is_gated else 1)
        first = packed_a16(prepared.w13, prepared.w13_scale, prepared.w13_global_scale, rows, hidden)
        second = packed_a16(prepared.w2, prepared.w2_scale, prepared.w2_global_scale, hidden, intermediate)
        # The kernel's own order is gate over up: preparing turns the halves.
        return moe.run(a, ids, weights, first, second, lambda values, _: act(values, up_first=False))


def packed_a16(codes: Tensor, scales: Tensor, factor: Tensor, rows: int, columns: int) -> Tensor:
    """Weights [E, rows, columns] of Marlin-like tiles of 16 x 64 codes and S0E5M3 scales; see moe_w4a16_prepare.py."""
    return torch.stack(
        [
            _packed_codes(codes[e], rows, columns) * _packed_scales(scales[e], rows, columns) * (factor[e] * 2.0**-126)
            for e in range(codes.shape[0])
        ]
    )


def _packed_codes(packed: Tensor, rows: int, columns: int) -> Tensor:
    words = packed.reshape(columns // 16, rows // 64, 128)
    values = torch.empty(columns, rows)
    place = torch.arange(128)
    thread, warp = place // 4, place % 4
    column, row = thread // 4, thread % 4 * 2
    for nibble, order in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        inner = row + torch.tensor([0, 1, 8, 9])[order % 4]
        outer = warp * 16 + column + 8 * (order // 4)
        code = (words >> (4 * nibble)) & 15
        number = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[code.long()]
        for i in range(columns // 16):
            values[(i * 16 + inner)[None, :], (torch.arange(rows // 64) * 64)[:, None] + outer[None, :]] = number[i]
    return values.T


def _packed_scales(scales: Tensor, rows: int, columns: int) -> Tensor:
    """S0E5M3 bytes as bfloat16's exponent and mantissa read them: (byte << 7) bits of a float with 5 exponent bits."""
    bits = scales.view(torch.uint8).reshape(columns // 16, -1, 4)[:, :, [0, 2, 1, 3]].reshape(columns // 16, rows)
    half = (bits.to(torch.int32) << 7).to(torch.int16).view(torch.float16).float()
    order = torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
    plain = torch.empty_like(half).reshape(columns // 16, rows // 64, 64)
    plain[:, :, order] = half.reshape(columns // 16, rows // 64, 64)
    return plain.reshape(columns // 16, rows).repeat_interleave(16, dim=0).T
