"""A double of csrc/fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu, in its NVFP4 mode."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_blackwell.experts_emulator import moe
from cuda_blackwell.experts_emulator.common import activation_of, constant
from cuda_blackwell.flashinfer_emulator import arithmetic, checks


class Cutlass:
    """flashinfer_cutlass_fused_moe_binding.cu, its NVFP4 mode."""

    def cutlass_fused_moe(
        self,
        output,
        x,
        ids,
        weights,
        w1,
        b1,
        w2,
        b2,
        output_dtype,
        scales,
        input_sf,
        alpha,
        beta,
        limit,
        _relu2_limit,
        _situ_beta,
        _situ_linear_beta,
        _swizzled,
        tp_size,
        tp_rank,
        ep_size,
        ep_rank,
        _cluster_size,
        _cluster_rank,
        **options,
    ) -> None:
        checks.contiguous(x=x, ids=ids, weights=weights, w1=w1, w2=w2, output=output)
        checks.aligned(32, x=x, output=output)
        checks.dtype(torch.int64, w1=w1, w2=w2)
        checks.dtype(torch.int32, ids=ids)
        checks.dtype(torch.float32, weights=weights)
        checks.dtype(output_dtype, x=x, output=output)
        if b1 is not None or b2 is not None or input_sf is not None or (tp_size, tp_rank, ep_rank) != (1, 0, 0):
            raise RuntimeError("biases, quantized inputs or other ranks are not what this plugin asks for")
        if any(options[name] for name in options if name.startswith("use_") and name != "use_fused_finalize"):
            raise RuntimeError("NVFP4 is selected by the dtype of the weights alone")
        if options["use_fused_finalize"]:
            raise RuntimeError("the fused finalize is not deterministic")
        kind = options["activation_type"]
        gated, experts = kind.is_gated, w2.shape[0]
        (hidden, intermediate), rows = (w2.shape[1], w2.shape[2] * 16), w1.shape[1]
        if rows != intermediate * (2 if gated else 1) or w1.shape[2] * 16 != hidden:
            raise RuntimeError(f"fc1 is {tuple(w1.shape)}, fc2 {tuple(w2.shape)}")
        if ids.max() >= experts * ep_size:
            raise RuntimeError(f"expert {int(ids.max())} of {experts * ep_size}")
        in1, sf1, alpha1, in2, sf2, alpha2 = scales
        checks.dtype(torch.float32, in1=in1, alpha1=alpha1, in2=in2, alpha2=alpha2)
        checks.dtype(torch.int32, sf1=sf1, sf2=sf2)
        checks.contiguous(sf1=sf1, sf2=sf2)
        aligned = arithmetic.pad(intermediate, 64)
        self._shape(sf1, experts, aligned * (2 if gated else 1), hidden)
        self._shape(sf2, experts, arithmetic.pad(hidden, 128), intermediate)
        if aligned % 128 and not gated:
            raise RuntimeError("fc1's scales are padded to 64 rows, and read in tiles of 128")
        for vector in (in1, alpha1, in2, alpha2):
            if vector.shape != (experts,):
                raise RuntimeError(f"a scale of each expert has shape {tuple(vector.shape)}")
        constants = [constant(value, experts) for value in (alpha, beta, limit)]
        activation = activation_of(kind, *constants)
        second = moe.swizzled(w2.view(torch.uint8), sf2.view(torch.uint8), 16) * alpha2[:, None, None]
        first = moe.swizzled(w1.view(torch.uint8), sf1.view(torch.uint8), 16) * alpha1[:, None, None]
        y = moe.run(
            x,
            ids,
            weights,
            first,
            second,
            lambda rows, _: activation(rows),
            inputs=moe.nvfp4(in1),
            hidden=moe.nvfp4(in2),
        )
        output.copy_(y)

    @staticmethod
    def _shape(scales: Tensor, experts: int, rows: int, columns: int) -> None:
        wanted = (experts, rows, arithmetic.pad(columns, 64) // 64)
        if tuple(scales.shape) != wanted:
            raise RuntimeError(f"block scales are {tuple(scales.shape)}, expected {wanted}")
