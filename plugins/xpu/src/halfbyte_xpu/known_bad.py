"""Combinations in which a kernel must not be chosen, by kernel id."""

from __future__ import annotations

from typing import Final

from halfbyte.specs import KnownBad

_END_OF_LIFE: Final = KnownBad(
    effect="end of life: the project was archived on 2026-03-30, gets no fixes and has known security issues",
    thread="https://github.com/intel/intel-extension-for-pytorch/issues/867",
)
KNOWN_BAD: Final[dict[str, tuple[KnownBad, ...]]] = {"xpu.ipex": (_END_OF_LIFE,)}
