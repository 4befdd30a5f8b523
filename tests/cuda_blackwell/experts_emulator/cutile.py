"""A double of FlashInfer's MoELayer for cuTile: the library's own runner checks what it is given, this computes."""

from __future__ import annotations

from typing import Any

import torch
from flashinfer.fused_moe import runners
from torch import Tensor

from cuda_blackwell.experts_emulator import moe
from cuda_blackwell.experts_emulator.common import activation_of
from cuda_blackwell.flashinfer_emulator import arithmetic, checks

_RUNNERS = {
    "CuTileNvfp4Bf16Config": runners.CuTileNvfp4Bf16Runner,
    "CuTileMxfp4Bf16Config": runners.CuTileMxfp4Bf16Runner,
}


class CuTileLayer:
    """MoELayer with one cuTile candidate on a card of `capability`."""

    capability = 90

    def __init__(self, config: Any, device: torch.device) -> None:
        (candidate,) = config.backend
        runner_class = _RUNNERS[type(candidate).__name__]
        if not candidate.supported(self.capability) or not runner_class.supports_quant(config.quant):
            raise RuntimeError(f"MoELayer: no backend of {config} is usable on sm_{self.capability}")
        runner = object.__new__(runner_class)
        runner.__dict__.update(
            config=config, device=device, _built=True, _device_arch=self.capability, _configure_tuning=lambda *_: None
        )
        self.config, self.runner = config, runner

    def __call__(self, act_pack: Any, weight_pack: Any) -> Tensor:
        if act_pack.num_tokens > self.config.execution.tune_max_num_tokens:
            raise ValueError(f"{act_pack.num_tokens} tokens")
        out, x, ids, weights, w1, s1, g1, w2, s2, g2 = self.runner.pack_inputs(act_pack, weight_pack)
        checks.aligned(32, x=x)
        if not 0 <= int(ids.min()) <= int(ids.max()) < w1.shape[0]:
            raise RuntimeError("an expert that is not there: the kernel would read out of bounds")
        group = self.runner._scale_block_size
        first, second = self._matrix(w1, s1, group), self._matrix(w2, s2, group)
        activation = self.config.activation
        constants = [getattr(activation, name, None) for name in ("alpha", "beta", "limit")]
        act = activation_of(activation.type, *constants)
        factors = g1 if g1.ndim == 2 else g1[:, None]
        if factors.shape[1] == 2:  # gate's, then up's
            factors = factors.repeat_interleave(w1.shape[1] // 2, dim=1)
        y = moe.run(
            x,
            ids,
            weights,
            first * factors[:, :, None],
            second * g2[:, None, None],
            lambda rows, _: act(rows, up_first=False),
        )
        return out.copy_(y)

    def _matrix(self, codes: Tensor, scales: Tensor, group: int) -> Tensor:
        if self.capability >= 100:
            return moe.swizzled(codes, scales.view(torch.uint8), group)
        decoded = arithmetic.decode_scales(scales.view(torch.uint8), group)
        return torch.stack([arithmetic.dequantize(*pair, group) for pair in zip(codes, decoded, strict=True)])
