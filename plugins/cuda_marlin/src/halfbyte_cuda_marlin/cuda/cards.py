"""What kernels must know of the card that they run on."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Final

import torch

#: Shared memory that one block of threads may ask for on Hopper, in bytes: all but what the kernels declare themselves.
SHARED_MEMORY: Final = 231_424
_DECLARED: Final = 1024


@dataclass(frozen=True, slots=True)
class Card:
    """`arch`: what NVRTC compiles for; `shared`: bytes of shared memory that a launch may ask for."""

    arch: str
    processors: int
    shared: int = SHARED_MEMORY

    @property
    def number(self) -> int:
        """90 for "sm_90a"; "compute_80", code that the driver compiles for newer cards, has 80."""
        return int(self.arch.partition("_")[2].rstrip("af"))

    @property
    def bulk(self) -> bool:
        """Whether it has copies that one thread asks for and a barrier counts."""
        return self.number >= 90

    @property
    def warpgroups(self) -> bool:
        """Whether it has Hopper's matrix units, which no later card has."""
        return self.arch == "sm_90a"


@functools.cache
def card(device: int, arch: str | None = None) -> Card:
    """The card of a CUDA device, as if it were of another architecture if one is given."""
    properties = torch.cuda.get_device_properties(device)
    major, minor = properties.major, properties.minor
    own = "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
    shared: int = properties.shared_memory_per_block_optin - _DECLARED  # type: ignore[attr-defined]
    return replace(Card(own, properties.multi_processor_count, shared), arch=arch or own)
