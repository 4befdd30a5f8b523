"""Where the kernel is known to fail: nowhere yet.

An entry names the effect, a public thread, and the version that mends it:

KnownBad(effect="crashes", thread="https://...", devices=("cpu",), requires="torch<2.11", fixed_in="torch 2.11")
"""

from __future__ import annotations

from halfbyte.specs import KnownBad

LUT_KNOWN_BAD: tuple[KnownBad, ...] = ()
