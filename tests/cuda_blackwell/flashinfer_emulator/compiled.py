"""Doubles of the compiled modules: each checks what its original checks or assumes, then computes from the bytes."""

# ruff: noqa: ARG002 - the signatures are the library's

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from flashinfer.gemm.gemm_base import TunableRunner
from flashinfer.trace.templates import gemm as references
from torch import Tensor

from cuda_blackwell.flashinfer_emulator import arithmetic, checks

#: trtllm's shuffled row i was row _ROWS[i] of its block of 32.
_ROWS = [4 * (i % 8) + i // 8 for i in range(32)]


class Quantization:
    """csrc/nv_internal/tensorrt_llm/thop/fp4Quantize.cpp, of one architecture."""

    def fp4_quantize(self, x, encode, codes, scales, group, ue8m0, swizzled, tile_8x4, inversed, _pdl, recipe) -> None:
        checks.contiguous(x=x)
        checks.aligned(32, x=x)  # two vectors of 16 bytes at a time
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise NotImplementedError(f"fp4_quantize only supports fp16 and bf16 here, not {x.dtype}")
        if x.stride(0) != x.shape[1] or (tile_8x4 and not swizzled) or inversed or recipe != 0:
            raise RuntimeError("rows that are not adjacent, an inverted scale or a recipe was asked for")
        if ue8m0 != (group == 32) or (encode is None) != ue8m0:
            raise RuntimeError(f"group {group} does not go with ue8m0={ue8m0} and global scale {encode}")
        checks.multiple(group, K=x.shape[1])
        if encode is not None:
            checks.scalar(encode)
        if swizzled:
            arithmetic.quantize(x, encode, codes, scales, 8 if tile_8x4 else 128)
            return
        columns = x.shape[1] // group
        buffer = torch.empty(arithmetic.pad(len(x), 128) * arithmetic.pad(columns, 4), dtype=torch.uint8)
        arithmetic.quantize(x, encode, codes, buffer, 128)
        scales.fill_(255)  # what comes after the rows is never written
        scales[: len(x) * columns] = buffer[arithmetic.offsets(len(x), columns, 128)].view(-1)


class Cutlass:
    """csrc/fp4_gemm_cutlass.cu."""

    def fp4_gemm_tactic_num(self) -> int:
        return 32

    def fp4_gemm(self, a, b, a_scales, b_scales, alpha, out, workspace, _tactic) -> None:
        checks.contiguous(a=a, b=b, a_scales=a_scales, b_scales=b_scales, workspace=workspace)
        checks.dtype(torch.uint8, a=a, b=b, a_scales=a_scales, b_scales=b_scales)
        checks.multiple(32, K=a.shape[1] * 2, N=b.shape[0])
        _compute(a, b, a_scales, b_scales, alpha, out, 16, 128)


class Trtllm:
    """csrc/trtllm_gemm_runner.cu: the weight's rows and its scales' rows are shuffled for the epilogue."""

    def trtllm_gemm(self, _input, _output, workspace, a, b, a_scales, b_scales, alpha, out, tile_8x4, _tactic) -> None:
        checks.contiguous(a=a, b=b, a_scales=a_scales, b_scales=b_scales, workspace=workspace)
        checks.dtype(torch.uint8, a=a, b=b, a_scales=a_scales, b_scales=b_scales)
        checks.dtype(torch.bfloat16, out=out)
        checks.multiple(128, N=b.shape[0])
        checks.multiple(64, K=a.shape[1] * 2)
        shuffled = torch.empty_like(out)
        _compute(a, b, a_scales, b_scales, alpha, shuffled, 16, 8 if tile_8x4 else 128)
        blocks = torch.arange(0, b.shape[0], 32)[:, None] + torch.tensor(_ROWS)[None, :]
        out[:, blocks.reshape(-1)] = shuffled


class Dsl(TunableRunner):  # type: ignore[misc]  # the library has no annotations
    """mm_fp4's runners in CuTe DSL (SM10x and b12x) and cuDNN's: they read operands through pointers."""

    def __init__(self, multiple_of_n: int) -> None:
        self._multiple_of_n = multiple_of_n

    def get_valid_tactics(self, inputs, profile):
        return [-1]

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        a, b, a_scales, b_scales, alpha, _, out, group, nvfp4, _ = inputs
        if nvfp4 != (group == 16):
            raise RuntimeError(f"group {group} with use_nvfp4={nvfp4}")
        checks.contiguous(a=a, b=b.T, a_scales=a_scales, b_scales=b_scales.T)
        checks.aligned(32, a=a, b=b)
        checks.aligned(16, a_scales=a_scales, b_scales=b_scales, out=out)
        checks.multiple(32, K=a.shape[1] * 2)
        checks.multiple(self._multiple_of_n, N=b.shape[1])
        _compute(a, b.T, a_scales, b_scales.T, alpha, out, group, 128)
        return out


class WeightOnlySm10x(TunableRunner):  # type: ignore[misc]
    """The kernel behind mm_bf16_fp4 on SM10x: by the wheel's own reference of its layout."""

    reference = staticmethod(references._mm_bf16_fp4_cute_dsl_sm100_reference)

    def get_valid_tactics(self, inputs, profile):
        return [-1]

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        x, weight, scales, alpha, _, out, group = inputs
        checks.contiguous(x=x, weight=weight, alpha=alpha)
        checks.aligned(32, x=x, weight=weight, out=out)
        checks.aligned(16, scales=scales, alpha=alpha)
        checks.scalar(alpha)
        self.check_layout(weight, scales)
        checks.result(out, x.shape[0], out.shape[1])
        out.copy_(self.reference(x, weight, scales, alpha, group))
        return out

    def check_layout(self, weight: Tensor, scales: Tensor) -> None:
        (n, k), shape = (weight.shape[0], weight.shape[1] * 2), tuple(scales.shape)
        checks.multiple(64, N=n, K=k)
        tiles_n, tiles_k = -(-n // 128), k // 64
        if shape != (32, 4, tiles_n, 4, tiles_k, 1) or not scales.permute(5, 2, 4, 0, 1, 3).is_contiguous():
            raise RuntimeError(f"scales are no 6-D view of 128x4 tiles: {shape}, strides {scales.stride()}")


class WeightOnlySm12x(WeightOnlySm10x):
    """The same on SM12x: repacked tiles of 16 x 64, and x rounded to float16 (use_fp16_mma is 1 without tuning)."""

    @staticmethod
    def reference(x: Tensor, *packed: Any) -> Tensor:
        result: Tensor = references._mm_bf16_fp4_cute_dsl_reference(x.half().float(), *packed)
        return result

    def check_layout(self, weight: Tensor, scales: Tensor) -> None:
        checks.dtype(torch.int32, weight=weight)
        checks.dtype(torch.uint8, scales=scales)
        checks.contiguous(scales=scales)
        checks.multiple(64, N=scales.shape[1], K=scales.shape[0] * 16)


def weight_only_cudnn(x, weight, scales, alpha, out_dtype, out, group) -> Tensor:
    """gemm_bf16_fp4_cudnn._compute_cudnn: codes and linear scales."""
    checks.contiguous(x=x, weight=weight, scales=scales)
    checks.dtype(torch.float8_e4m3fn, scales=scales)
    return references._mm_bf16_fp4_cudnn_reference(x, weight, scales, alpha, group).to(out_dtype)


def built(module: object) -> SimpleNamespace:
    """What the generators return: something that builds, loads and gives the module."""
    return SimpleNamespace(build_and_load=lambda: module, get_library_paths=list)


def _compute(a, b, a_scales, b_scales, alpha, out: Tensor, group: int, tile: int) -> None:
    checks.result(out, a.shape[0], b.shape[0])
    if a.shape[1] != b.shape[1]:
        raise RuntimeError(f"{tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    number = checks.scalar(alpha)
    out.copy_(arithmetic.product(a, a_scales, b, b_scales, group, tile) * number)
