"""The dialect of gpt-oss: MXFP4 experts in fused `_blocks` and `_scales`. Torch-free.

Source: OpenAI's gpt-oss release. gate_up_proj holds gate in its even rows and up in its odd rows; each block of 16
bytes is a group of 32 values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from halfbyte.checkpoints.configs import Config
from halfbyte.checkpoints.headers import TensorInfo
from halfbyte.checkpoints.matrices import check_bias, check_scales
from halfbyte.checkpoints.sources import Found, MatrixSource, Role
from halfbyte.schemes import MXFP4_W4A16

_BLOCKS: Final = re.compile(r"(?P<name>(?P<layer>.+\.experts)\.(?P<projection>gate_up_proj|down_proj))_blocks")
#: Which rows of a fused parameter are which projection: role, first row, step.
_ROWS: Final[Mapping[str, tuple[tuple[Role, int, int], ...]]] = {
    "gate_up_proj": (("gate", 0, 2), ("up", 1, 2)),
    "down_proj": (("down", 0, 1),),
}


def find(quantization: Config, tensors: Mapping[str, TensorInfo]) -> Found:
    """Every expert matrix of a gpt-oss checkpoint; CheckpointError for missing or wrongly shaped tensors."""
    del quantization  # it says nothing about the tensors
    matrices: list[MatrixSource] = []
    used: set[str] = set()
    for tensor, blocks in tensors.items():
        match = _BLOCKS.fullmatch(tensor)
        if match is None:
            continue
        name = match["name"]
        if f"{name}_scales" not in tensors:
            raise blocks.error(f"its partner {f'{name}_scales'!r} is missing")
        scales, bias = tensors[f"{name}_scales"], tensors.get(f"{name}_bias")
        _check(blocks, scales, bias, step=len(_ROWS[match["projection"]]))
        for role, first, step in _ROWS[match["projection"]]:
            matrices += _experts(name, match["layer"], role, (first, step), blocks, scales, bias)
        used.update(info.name for info in (blocks, scales, bias) if info is not None)
    return Found(tuple(matrices), frozenset(used))


def _check(blocks: TensorInfo, scales: TensorInfo, bias: TensorInfo | None, *, step: int) -> None:
    fmt, shape = MXFP4_W4A16.weights, blocks.shape
    block = fmt.group_size // 2
    if blocks.dtype != "U8" or len(shape) != 4 or shape[-1] != block or 0 in shape or shape[1] % step:
        rows = "rows" if step == 1 else f"{step} * rows"
        raise blocks.error(
            f"is {blocks.dtype} {list(shape)}, expected U8 [experts, {rows}, K/{fmt.group_size}, {block}]"
        )
    check_scales(scales, shape[:3], fmt)
    check_bias(bias, shape[:2])


def _experts(
    name: str,
    layer: str,
    role: Role,
    fused: tuple[int, int],
    blocks: TensorInfo,
    scales: TensorInfo,
    bias: TensorInfo | None,
) -> Iterator[MatrixSource]:
    experts, rows, groups, _ = blocks.shape
    for expert in range(experts):
        yield MatrixSource(
            name=name,
            layer=layer,
            role=role,
            expert=expert,
            scheme=MXFP4_W4A16,
            n=rows // fused[1],
            k=groups * MXFP4_W4A16.weights.group_size,
            packed=blocks,
            scales=scales,
            bias=bias,
            fused=fused,
        )
