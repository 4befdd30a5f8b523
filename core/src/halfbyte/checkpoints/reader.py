"""Read the tensors of a planned checkpoint, one layer at a time, into canonical weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import BufferedReader
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from halfbyte.checkpoints.headers import TensorInfo
from halfbyte.checkpoints.plan import Plan
from halfbyte.checkpoints.sources import LayerPlan, MatrixSource
from halfbyte.errors import CheckpointError, UsageError, nearest
from halfbyte.matrix import SCALE_DTYPES, Matrix
from halfbyte.weights import ExpertsWeights, LinearWeights

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """A planned checkpoint with its files open: `with Checkpoint(plan(path)) as checkpoint: ...`.

    Bytes are read into tensors of their own rather than mapped, so that memory holds what was asked for and nothing
    else. All tensors are on the CPU. CheckpointError names the tensor that cannot be used.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._unquantized = {info.name: info for info in plan.unquantized}
        self._open = ExitStack()
        self._files: dict[Path, BufferedReader] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.clear()
        self._open.close()

    def linear(self, layer: LayerPlan) -> LinearWeights:
        """The weights of a linear layer: packed [N, K/2], scales [N, K/group_size], bias [N]."""
        (source,) = layer.sources["weight"]
        (matrix,) = self._matrices([(source,)], stacked=False)
        return LinearWeights(scheme=source.scheme, matrix=matrix)

    def experts(self, layer: LayerPlan) -> ExpertsWeights:
        """The weights of an experts layer: gate and up [E, I, H], down [E, H, I]; no more is held than these."""
        # Gate and up together: where a tensor holds the rows of both, it is read once.
        *gate, up = self._matrices([layer.sources[role] for role in ("gate", "up") if role in layer.sources])
        (down,) = self._matrices([layer.sources["down"]])
        return ExpertsWeights(scheme=layer.problem.scheme, gate=gate[0] if gate else None, up=up, down=down)

    def tensor(self, name: str) -> Tensor:
        """An unquantized tensor as it is stored; UsageError for a name that is not in `plan.unquantized`."""
        if name not in self._unquantized:
            raise UsageError(f"no unquantized tensor {name!r} in {self.plan.path}{nearest(name, self._unquantized)}")
        info = self._unquantized[name]
        if info.dtype not in _DTYPES:
            raise info.error(f"has dtype {info.dtype}, which cannot be read")
        buffer = _buffer(info.nbytes)
        self._read(info, info.start, buffer)
        return _tensor(buffer, _DTYPES[info.dtype], info.shape)

    def _matrices(self, stacks: Sequence[Sequence[MatrixSource]], *, stacked: bool = True) -> list[Matrix]:
        """One matrix for each stack of sources; all stacks have the same number of sources of the same size."""
        first = stacks[0][0]
        fmt, lead = first.scheme.weights, (len(stacks[0]), first.n) if stacked else (first.n,)
        grouped = (*lead, first.k // fmt.group_size)
        packed = self._gather(stacks, attrgetter("packed"), torch.uint8, (*lead, first.k // 2))
        scales = self._gather(stacks, attrgetter("scales"), SCALE_DTYPES[fmt.scale], grouped)
        biases: Sequence[Tensor | None] = [None] * len(stacks)
        if first.bias is not None:
            biases = self._gather(stacks, attrgetter("bias"), _DTYPES[first.bias.dtype], lead)
        parts = zip(stacks, packed, scales, biases, strict=True)
        return [_canonical(sources, p, s, bias, stacked=stacked) for sources, p, s, bias in parts]

    def _gather(
        self,
        stacks: Sequence[Sequence[MatrixSource]],
        tensor_of: Callable[[MatrixSource], TensorInfo],
        dtype: torch.dtype,
        shape: tuple[int, ...],
    ) -> list[Tensor]:
        """One tensor [*shape] for each stack, with a share of equal size for every source, read in place."""
        size = math.prod(shape) * dtype.itemsize
        buffers, share = [_buffer(size) for _ in stacks], size // len(stacks[0])
        for number, sources in enumerate(zip(*stacks, strict=True)):
            shares = [buffer[number * share : (number + 1) * share] for buffer in buffers]
            self._fill(shares, sources, [tensor_of(source) for source in sources])
        return [_tensor(buffer, dtype, shape) for buffer in buffers]

    def _fill(self, outs: Sequence[memoryview], sources: Sequence[MatrixSource], infos: Sequence[TensorInfo]) -> None:
        rows: dict[str, Tensor] = {}
        for out, source, info in zip(outs, sources, infos, strict=True):
            if source.fused is None or source.expert is None:
                self._read(info, info.start, out)
                continue
            (first, step), size = source.fused, info.nbytes // info.shape[0]
            start = info.start + source.expert * size
            if step == 1:
                self._read(info, start, out)
                continue
            if info.name not in rows:
                buffer = _buffer(size)
                self._read(info, start, buffer)
                rows[info.name] = _tensor(buffer, torch.uint8, (info.shape[1], -1))
            chosen = rows[info.name][first::step]
            _tensor(out, torch.uint8, tuple(chosen.shape)).copy_(chosen)

    def _read(self, info: TensorInfo, start: int, out: memoryview) -> None:
        if info.file not in self._files:
            self._files[info.file] = self._open.enter_context(info.file.open("rb"))
        file = self._files[info.file]
        file.seek(start)
        if file.readinto(out) != len(out):
            raise info.error("ends before its last byte: the file has changed since it was planned")


def _canonical(
    sources: Sequence[MatrixSource], packed: Tensor, scales: Tensor, bias: Tensor | None, *, stacked: bool
) -> Matrix:
    first = sources[0]
    zero = (scales.view(torch.uint8).view(len(sources), -1) == 0).all(-1)
    if bool(zero.any()):
        empty = sources[int(zero.nonzero()[0])]
        raise empty.scales.error("is all zeros: the scales were never filled in")
    try:
        return Matrix(
            name=first.name.replace(".experts.0.", ".experts.*.") if stacked else first.name,
            format=first.scheme.weights,
            packed=packed,
            scales=scales,
            global_scale=_multipliers([source.global_scale for source in sources]),
            input_global_scale=_multipliers([source.input_global_scale for source in sources]),
            bias=bias,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{first.packed.file}: {error}") from error


def _buffer(size: int) -> memoryview:
    return memoryview(bytearray(size))


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor that shares the buffer's memory."""
    if not len(buffer):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).view(shape)


def _multipliers(values: Sequence[float | None]) -> Tensor | None:
    if None in values:
        return None
    return torch.tensor(values, dtype=torch.float64)
