"""Experts of cuTile through FlashInfer's `MoELayer`: FP4 weights, bfloat16 activations, on Ada, Hopper and SM12x.

Source of the contract: flashinfer-python 0.7.2, `fused_moe/prepare.py` (prepare_cutile_nvfp4_weights and
prepare_cutile_mxfp4_weights) and `fused_moe/runners.py`, _CuTileFp4Runner.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_blackwell import ops
from halfbyte_cuda_blackwell.experts_packing import (
    SWIGLUOAI,
    first_projection,
    local_numbers,
    multipliers,
    second_projection,
)

if TYPE_CHECKING:
    from flashinfer.fused_moe import MoELayer

_CAPABILITIES: Final = (89, 90, 120, 121)
#: Tokens of one call: the library keeps buffers for as many.
_TOKENS: Final = 8192
_SCALE_DTYPES: Final = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.float8_e8m0fnu}


class CuTile:
    """NVFP4 and MXFP4, W4A16. Gate and up keep a global scale each."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """What the library makes of up over gate and down for this device, 8-bit scales as uint8."""
        first, second = first_projection(weights), second_projection(weights)
        ops.require_capability(first.packed.device, _CAPABILITIES, "flashinfer.cutile")
        sizes = {
            "num_local_experts": problem.experts,
            "hidden_size": problem.hidden,
            "intermediate_size": problem.intermediate,
            "activation": _activation(problem),
            "device": first.packed.device,
        }
        config: Any = _config(problem)
        if problem.scheme.weights.has_global_scale:
            scale = multipliers(weights.up)
            if weights.gate is not None:
                scale = torch.stack((scale, multipliers(weights.gate)), dim=1)
            both = (first.packed, first.scales, scale, second.packed, second.scales, multipliers(second))
            view = config.prepare_weights(*both, source_format="modelopt", **sizes)
        else:
            view = config.prepare_weights(first.packed, first.scales, second.packed, second.scales, **sizes)
        return {name: _as_bytes(tensor) for name, tensor in view.items()}

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H], in turns of at most 8192 tokens.

        The library has no experts elsewhere: those slots go to local experts in turn, with a weight of zero.
        """
        problem = cast("ExpertsProblem", packed.problem)
        if expert_map is not None:
            local = local_numbers(topk_ids, expert_map)
            topk_weights = topk_weights.masked_fill(local < 0, 0.0)
            topk_ids = torch.where(local < 0, topk_ids % problem.experts, local)
        if len(x) <= _TOKENS:
            return _run(x, packed, topk_ids, topk_weights)
        parts = zip(x.split(_TOKENS), topk_ids.split(_TOKENS), topk_weights.split(_TOKENS), strict=True)
        return torch.cat([_run(rows, packed, ids, weights) for rows, ids, weights in parts])


def _run(x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    from flashinfer.fused_moe import MoEActivationPack, MoEWeightPack

    problem = cast("ExpertsProblem", packed.problem)
    fmt = problem.scheme.weights.name
    view = dict(packed.tensors)
    for name in ("w1_scale", "w2_scale"):
        view[name] = view[name].view(_SCALE_DTYPES[fmt])
    weights = MoEWeightPack()
    weights.prepare_for(f"cutile_{fmt}", view)
    with ops.current(x.device):
        layer = _layer(problem, x.device, threading.get_ident())
        y: Tensor = layer(MoEActivationPack(ops.aligned(x), None, topk_ids, topk_weights), weights)
    return y


@cache
def _layer(problem: ExpertsProblem, device: torch.device, thread: int) -> MoELayer:  # noqa: ARG001 - one for each thread
    """The library's layer for a problem: it holds no weights, but buffers that two threads must not share."""
    from flashinfer.fused_moe import (
        BackendOptions,
        ExecutionConfig,
        ExpertConfig,
        MoEConfig,
        MoELayer,
        QuantConfig,
        QuantFormat,
        RoutingConfig,
    )

    config = MoEConfig(
        routing=RoutingConfig(num_experts=problem.experts, top_k=problem.top_k),
        quant=QuantConfig(
            weight=QuantFormat[problem.scheme.weights.name.upper()],
            activation=QuantFormat.BF16,
        ),
        experts=ExpertConfig(intermediate_size=problem.intermediate),
        activation=_activation(problem),
        backend=BackendOptions((_config(problem),)),
        execution=ExecutionConfig(tune_max_num_tokens=_TOKENS),
    )
    return MoELayer(config, device)


def _config(problem: ExpertsProblem) -> object:
    from flashinfer.fused_moe import CuTileMxfp4Bf16Config, CuTileNvfp4Bf16Config

    config: object = (CuTileNvfp4Bf16Config if problem.scheme.weights.has_global_scale else CuTileMxfp4Bf16Config)()
    return config


def _activation(problem: ExpertsProblem) -> Any:
    from flashinfer.fused_moe import GeGLUTanh, ReLU2, SwiGLU

    made = {"silu": SwiGLU, "gelu_tanh": GeGLUTanh, "relu2": ReLU2}
    return SwiGLU(**SWIGLUOAI) if problem.activation == "swigluoai" else made[problem.activation]()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
