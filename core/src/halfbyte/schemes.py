"""Schemes: weight format x activation format. Weight-only is the same scheme with no activation format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from halfbyte.errors import UsageError, nearest
from halfbyte.formats import MXFP4, NVFP4, Format


@dataclass(frozen=True, slots=True)
class Scheme:
    """Which format the weights have, and which the activations (None: they stay in 16 or 32 bits)."""

    weights: Format
    activations: Format | None = None

    def __post_init__(self) -> None:
        if self.activations not in (None, self.weights):
            raise UsageError(
                f"weights in {self.weights} with activations in {self.activations} is no scheme of halfbyte; "
                f"activations are {self.weights} or not quantized"
            )

    @property
    def name(self) -> str:
        """The scheme's name, such as "nvfp4-w4a16"."""
        return f"{self.weights.name}-w4a{16 if self.activations is None else 4}"

    @property
    def weight_only(self) -> Scheme:
        """The same weights with activations that stay in 16 or 32 bits."""
        return Scheme(self.weights)

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(name: str) -> Scheme:
        """Return the scheme of this name; UsageError with the nearest match if there is none."""
        try:
            return SCHEMES[name]
        except KeyError:
            raise UsageError(f"unknown scheme {name!r}{nearest(name, SCHEMES)}") from None


NVFP4_W4A4: Final = Scheme(NVFP4, NVFP4)
NVFP4_W4A16: Final = Scheme(NVFP4)
MXFP4_W4A4: Final = Scheme(MXFP4, MXFP4)
MXFP4_W4A16: Final = Scheme(MXFP4)
SCHEMES: Final = {s.name: s for s in (NVFP4_W4A4, NVFP4_W4A16, MXFP4_W4A4, MXFP4_W4A16)}
