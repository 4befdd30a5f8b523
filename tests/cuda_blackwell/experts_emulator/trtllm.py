"""A double of csrc/trtllm_fused_moe_kernel_launcher.cu, FP4BlockScaleLauncher, with routing as ids and weights."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from flashinfer.tllm_enums import ActivationType, SfLayout
from torch import Tensor

from cuda_blackwell.experts_emulator import moe
from cuda_blackwell.experts_emulator.common import activation_of, constant
from cuda_blackwell.flashinfer_emulator import arithmetic, checks

#: The arguments of the compiled operator, in order.
_ARGUMENTS = (
    "mode",
    "logits",
    "ids",
    "weights",
    "routing_bias",
    "x",
    "x_scales",
    "w1",
    "sf1",
    "b1",
    "lora",
    "alpha",
    "beta",
    "limit",
    "w2",
    "sf2",
    "b2",
    "up_scale",
    "gate_scale",
    "down_scale",
    "per_token",
    "num_experts",
    "top_k",
    "shared",
    "n_group",
    "topk_group",
    "intermediate",
    "offset",
    "local",
    "factor",
    "routing_method",
    "do_finalize",
    "pdl",
    "kind",
    "output",
    "tune",
    "norm",
    "replay",
    "valid_hidden",
    "valid_intermediate",
    "layout",
)


def trtllm(*arguments: object) -> list[Tensor]:
    call = SimpleNamespace(**dict(zip(_ARGUMENTS, arguments, strict=True)))
    _check_routing(call)
    _check_weights(call)
    y = _nvfp4(call) if call.x.dtype == torch.uint8 else _mxfp4(call)
    return [call.output.copy_(y)]


def _check_routing(call: SimpleNamespace) -> None:
    count, ids = call.num_experts, call.ids
    if call.logits is not None or not 0 < call.top_k <= count or count % 4 or call.offset or call.local > count:
        raise RuntimeError(f"{count} experts, {call.local} of them here from {call.offset} on, top {call.top_k}")
    if ids.max() >= count or tuple(ids.shape) != (len(call.x), call.top_k):
        raise RuntimeError(f"expert {int(ids.max())} of {count}, ids {tuple(ids.shape)}")
    if call.layout != SfLayout.layout_linear or not call.do_finalize or call.kind != ActivationType.Swiglu.value:
        raise RuntimeError(f"layout {call.layout}, finalize {call.do_finalize}, activation {call.kind}")
    checks.dtype(torch.int32, ids=ids)
    checks.dtype(torch.float32, weights=call.weights)
    checks.aligned(32, x=call.x, output=call.output)
    checks.contiguous(x=call.x, ids=ids, weights=call.weights)


def _check_weights(call: SimpleNamespace) -> None:
    local, intermediate, hidden = call.local, call.intermediate, call.w2.shape[1]
    checks.dtype(torch.uint8, w1=call.w1, w2=call.w2)
    checks.dtype(torch.float8_e4m3fn, sf1=call.sf1, sf2=call.sf2)
    checks.dtype(torch.bfloat16, output=call.output)
    checks.contiguous(w1=call.w1, sf1=call.sf1, w2=call.w2, sf2=call.sf2, output=call.output)
    checks.multiple(128, rows=call.w1.shape[1], hidden=hidden, intermediate=intermediate)
    if call.w1.shape != (local, 2 * intermediate, hidden // 2) or call.w2.shape != (local, hidden, intermediate // 2):
        raise RuntimeError(f"weights {tuple(call.w1.shape)}, {tuple(call.w2.shape)}")
    group = 16 if call.x.dtype == torch.uint8 else 32
    for scales, rows, columns in ((call.sf1, 2 * intermediate, hidden), (call.sf2, hidden, intermediate)):
        if scales.shape != (local, rows, columns // group):
            raise RuntimeError(f"scales {tuple(scales.shape)} for {rows} x {columns}")


def _matrices(call: SimpleNamespace, group: int) -> tuple[Tensor, Tensor]:
    """Up over gate [E, 2I, H] and down [E, H, I]: the shuffle and the turns of rows undone."""
    first, second = (
        moe.unshuffled(moe.swizzled(codes, scales.view(torch.uint8), group))
        for codes, scales in ((call.w1, call.sf1), (call.w2, call.sf2))
    )
    return moe.halves(first, 1), second


def _nvfp4(call: SimpleNamespace) -> Tensor:
    checks.dtype(torch.float8_e4m3fn, x_scales=call.x_scales)
    checks.dtype(torch.float32, up=call.up_scale, gate=call.gate_scale, down=call.down_scale, alpha=call.alpha)
    if call.b1 is not None or call.b2 is not None:
        raise RuntimeError("NVFP4 with biases: they would have to be scaled")
    for values in (call.beta, call.limit):
        if values is not None:
            checks.dtype(torch.float32, values=values)
    first, second = _matrices(call, 16)

    def activate(values: Tensor, expert: int) -> Tensor:
        """Clamp and add before anything is scaled."""
        up, gate = values.chunk(2, dim=-1)
        if call.limit is not None:
            limit = call.limit[expert].item()
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if call.beta is not None:
            up = up + call.beta[expert]
        gate = gate * call.gate_scale[expert]
        return gate * torch.sigmoid(call.alpha[expert] * gate) * up * call.up_scale[expert]

    # The quantizer of the hidden activations has no global scale: that is in the factor of up.
    return moe.run(
        arithmetic.dequantize(call.x, call.x_scales.float(), 16),
        call.ids,
        call.weights,
        first,
        second * call.down_scale[:, None, None],
        activate,
        hidden=moe.nvfp4(torch.ones(1)),
    )


def _mxfp4(call: SimpleNamespace) -> Tensor:
    checks.dtype(torch.bfloat16, x=call.x)
    if any(scale is not None for scale in (call.x_scales, call.up_scale, call.gate_scale, call.down_scale)):
        raise RuntimeError("MXFP4 with bfloat16 has no scales but the weights'")
    constants = (constant(values, call.local) for values in (call.alpha, call.beta, call.limit))
    activation = activation_of(ActivationType.Swiglu, *constants)
    biases = None
    if call.b1 is not None:
        checks.dtype(torch.float32, b1=call.b1, b2=call.b2)
        checks.contiguous(b1=call.b1, b2=call.b2)
        biases = (moe.halves(moe.unshuffled(call.b1), 1), moe.unshuffled(call.b2))
    first, second = _matrices(call, 32)
    return moe.run(call.x, call.ids, call.weights, first, second, lambda values, _: activation(values), biases=biases)
