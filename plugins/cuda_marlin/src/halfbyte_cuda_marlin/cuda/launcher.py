"""Launches that differ in their tensors alone, at little cost for the host: everything else is laid out once."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from halfbyte_cuda_marlin.cuda.driver import (
    CLUSTER_DIMENSION,
    POINTERS,
    PROGRAMMATIC_STREAM_SERIALIZATION,
    Attribute,
    Config,
    check,
    encode_map,
    launch_bound,
)
from halfbyte_cuda_marlin.cuda.workspace import workspace

_ADDRESSES: Final = struct.Struct(f"@{len(POINTERS)}P")


@dataclass(frozen=True, slots=True)
class XMap:
    """The kernel's second argument: x of this shape in boxes of `rows`; see `driver.encode_map`."""

    shape: tuple[int, int]
    rows: int
    bf16: bool


class _Frame:
    """The memory of one launch. The map of x is kept, since many calls find x where the last one did."""

    __slots__ = ("arguments", "config", "config_at", "map_at", "mapped", "memory", "parameters", "parameters_at")

    def __init__(self, arguments: ctypes.Structure, config: Config) -> None:
        self.arguments, self.config = type(arguments).from_buffer_copy(arguments), config
        self.memory = ctypes.create_string_buffer(192)
        self.map_at, self.mapped = (ctypes.addressof(self.memory) + 63) & ~63, 0
        self.parameters = (ctypes.c_void_p * 2)(ctypes.addressof(self.arguments), self.map_at)
        self.config_at, self.parameters_at = ctypes.addressof(config), ctypes.addressof(self.parameters)


class Launcher:
    """A kernel with its grid, and numbers that are the same in every launch.

    Args:
        kernel: from `driver.function`, on `device`.
        grid: blocks, threads, bytes of shared memory.
        arguments: the kernel's first argument, which begins with POINTERS.
        x_map: what its second argument is, if it has one.
        sums: how many partial sums and counters it needs (see workspace.py).
        early: it may start while the kernel in front of it ends; see below.
        cluster: how many neighbouring blocks run side by side and share memory.

    A kernel that starts early reads weights at once and waits before it touches anything else. That is right as long as
    what writes weights does not use griddepcontrol.launch_dependents: by PTX's manual, all that comes after it then
    begins when it has ended. Neither packing nor torch's copies use it.
    """

    def __init__(
        self,
        kernel: ctypes.c_void_p,
        device: torch.device,
        grid: tuple[int, int, int],
        arguments: ctypes.Structure,
        *,
        x_map: XMap | None = None,
        sums: tuple[int, int] | None = None,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        self._kernel, self._device, self._index, self._grid = kernel, device, device.index or 0, grid
        self._arguments, self._x_map, self._sums = arguments, x_map, sums
        asked = [Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1)] if early else []
        if cluster > 1:
            asked.append(Attribute(CLUSTER_DIMENSION, b"", cluster, 1, 1))
        self._attributes = (Attribute * len(asked))(*asked)
        # Each is one call's at a time: a list's pop and append are atomic.
        self._idle: list[_Frame] = []

    def __call__(self, x: Tensor, units: Tensor, rows: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Launch on torch's current stream of the device, which must be the current one."""
        part = counter = 0
        if self._sums is not None:
            kept = workspace(self._device, *self._sums)
            part, counter = kept[0].data_ptr(), kept[1].data_ptr()
        try:
            frame = self._idle.pop()
        except IndexError:
            frame = self._frame()
        at, add = x.data_ptr(), 0 if bias is None else bias.data_ptr()
        addresses = (at, units.data_ptr(), rows.data_ptr(), add, y.data_ptr(), part, counter)
        _ADDRESSES.pack_into(frame.arguments, 0, *addresses)
        x_map = self._x_map
        if x_map is not None and frame.mapped != at:
            encode_map(frame.map_at, at, x_map.shape, x_map.rows, bf16=x_map.bf16)
            frame.mapped = at
        frame.config.stream = torch._C._cuda_getCurrentRawStream(self._index)
        failed = launch_bound(frame.config_at, self._kernel, frame.parameters_at, self._index)
        self._idle.append(frame)
        if failed:
            check(failed, "cuLaunchKernelEx")

    def _frame(self) -> _Frame:
        blocks, threads, shared = self._grid
        at, count = ctypes.addressof(self._attributes), len(self._attributes)
        return _Frame(self._arguments, Config(blocks, 1, 1, threads, 1, 1, shared, None, at, count))
