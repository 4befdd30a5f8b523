"""Faults of the plugin, each of which the conformance kit over the emulated library has to find."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from torch import Tensor

from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_blackwell import (
    experts_b12x,
    experts_cute_dsl,
    experts_cutile,
    experts_cutlass,
    experts_trtllm,
    packing,
)

_MODULES = (experts_b12x, experts_cute_dsl, experts_cutile, experts_cutlass, experts_trtllm)


@contextlib.contextmanager
def _replaced(name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`make` of the function of this name instead of it, in every module that has one."""
    with contextlib.ExitStack() as stack:
        for module in _MODULES:
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, make(getattr(module, name))))
        yield


def _linear_scales(_: Any) -> Callable[[Tensor], Tensor]:
    """The right size, zero in the padding, and not swizzled."""
    return lambda scales: packing._padded(scales).clone()


def _swapped_nibbles(projection: Callable[[ExpertsWeights], Any]) -> Callable[[ExpertsWeights], Any]:
    def swapped(weights: ExpertsWeights) -> Any:
        matrix = projection(weights)
        return replace(matrix, packed=matrix.packed >> 4 | matrix.packed << 4)

    return swapped


def _gate_first(projection: Callable[[ExpertsWeights], Any]) -> Callable[[ExpertsWeights], Any]:
    def swapped(weights: ExpertsWeights) -> Any:
        if weights.gate is None:
            return projection(weights)
        return projection(replace(weights, gate=weights.up, up=weights.gate))

    return swapped


def _inverted(scale: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: scale(*arguments).reciprocal()


def _largest(scales: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The largest input scale for all experts."""

    def largest(*arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, hidden = scales(*arguments)
        return inputs.max().expand_as(inputs), hidden.max().expand_as(hidden)

    return largest


def _other(scales: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Other input scales, which the factors of the products have in them too: only the rounding is another."""

    def other(*arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, hidden = scales(*arguments)
        return inputs * 1.4, hidden * 1.4

    return other


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "none": contextlib.nullcontext,
    "swapped-nibbles": lambda: _replaced("first_projection", _swapped_nibbles),
    "swapped-nibbles-down": lambda: _replaced("second_projection", _swapped_nibbles),
    "linear-scales": lambda: _replaced("swizzle_128x4", _linear_scales),
    "unshuffled-rows": lambda: _replaced("shuffled_rows", lambda _: lambda rows: rows.clone()),
    "uninterleaved-rows": lambda: _replaced("interleaved", lambda _: lambda rows, _: rows.clone()),
    "swapped-gate-up": lambda: _replaced("first_projection", _gate_first),
    "inverted-global-scale": lambda: _replaced("multipliers", _inverted),
    "inverted-factors": lambda: _replaced("product", _inverted),
    "largest-input-scale": lambda: _replaced("input_multipliers", _largest),
    "other-input-scale": lambda: _replaced("input_multipliers", _other),
}
