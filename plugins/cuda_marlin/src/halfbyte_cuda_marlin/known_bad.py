"""Combinations in which a kernel must not be chosen, by kernel id. None is known."""

from __future__ import annotations

from typing import Final

from halfbyte.specs import KnownBad

KNOWN_BAD: Final[dict[str, tuple[KnownBad, ...]]] = {}
