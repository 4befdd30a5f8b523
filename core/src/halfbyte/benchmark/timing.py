"""Median times of calls: CUDA graphs over weights that are not in the cache, repeated calls elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final, TypeAlias

import torch
from torch import Tensor

Call: TypeAlias = Callable[[], Tensor]

#: Seconds spent on one number, and the least count of measurements.
_SECONDS: Final = 0.15
_LEAST: Final = 5
#: More copies than this would only measure the length of the graph.
_MOST_COPIES: Final = 512


def copies_needed(bytes_read: float, device: torch.device) -> int:
    """Of how many copies of weights a call each reads twice the device's L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_COPIES, int(2 * cache / max(1.0, bytes_read)) + 1)


def median_microseconds(calls: Sequence[Call], device: torch.device) -> float:
    """The median time of one call. `calls` do the same with different copies of the weights.

    On CUDA all of them are captured in one graph, so that each finds its weights outside the cache and no time of the
    host counts; elsewhere they are made one after the other.
    """
    if device.type == "cuda":
        return _graph_microseconds(calls, device)
    synchronize = _nothing if device.type == "cpu" else torch.accelerator.synchronize
    times: list[float] = []
    calls[0]()
    synchronize()
    stop = time.perf_counter() + _SECONDS
    while len(times) < _LEAST or time.perf_counter() < stop:
        for call in calls:
            start = time.perf_counter_ns()
            call()
            synchronize()
            times.append((time.perf_counter_ns() - start) / 1e3)
    return median(times)


def _nothing() -> None:
    return None


def _graph_microseconds(calls: Sequence[Call], device: torch.device) -> float:
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (*calls, calls[0]):  # what a layer does at its first call may not be capturable
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        times: list[float] = []
        stop = time.perf_counter() + _SECONDS
        while len(times) < _LEAST or time.perf_counter() < stop:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times)
