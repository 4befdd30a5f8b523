"""Faults of the plugin, each of which the conformance kit over the emulated library has to find."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from halfbyte_cuda_blackwell import linear, packing, weight_only


@contextlib.contextmanager
def _replaced(name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Another function in both kernels' modules, where they have one of this name."""
    with contextlib.ExitStack() as stack:
        for module in (linear, weight_only):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextlib.contextmanager
def _swapped_nibbles() -> Iterator[None]:
    def preparing(prepare: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def swapped(self: Any, weights: Any, problem: Any) -> dict[str, Tensor]:
            packed = weights.matrix.packed
            own = packed.clone()
            packed.copy_(own >> 4 | own << 4)
            try:
                return prepare(self, weights, problem)
            finally:
                packed.copy_(own)

        return swapped

    with (
        mock.patch.object(linear._MmFp4, "prepare", preparing(linear._MmFp4.prepare)),
        mock.patch.object(weight_only.Bf16Fp4, "prepare", preparing(weight_only.Bf16Fp4.prepare)),
    ):
        yield


def _linear_scales(scales: Tensor) -> Tensor:
    """The right size, zero in the padding, and not swizzled."""
    return packing._padded(scales).clone()


def _unshuffled(rows: Tensor) -> Tensor:
    return rows.clone()


def _inverted(device: torch.device, values: Tensor) -> Tensor:
    return packing.float32_on(device, values.reciprocal())


@contextlib.contextmanager
def _scales_swizzled_before_the_rows() -> Iterator[None]:
    """The order that FlashInfer's pull request 4093 mended: the swizzle first, then the rows."""

    def wrong(scales: Tensor) -> Tensor:
        blocks = scales.reshape(-1, 4, 8, scales.shape[-1]).transpose(1, 2).reshape(scales.shape)  # shuffled back
        return packing.shuffled_rows(packing.swizzle_128x4(blocks))

    with mock.patch.object(linear, "swizzle_128x4", wrong):
        yield


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "swapped-nibbles": _swapped_nibbles,
    "linear-scales": lambda: _replaced("swizzle_128x4", _linear_scales),
    "unshuffled-rows": lambda: _replaced("shuffled_rows", _unshuffled),
    "rows-after-the-swizzle": _scales_swizzled_before_the_rows,
    "inverted-global-scale": lambda: _replaced("float32_on", _inverted),
}
