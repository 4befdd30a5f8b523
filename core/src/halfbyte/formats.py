"""The two FP4 number formats, as data.

Sources: OCP Microscaling Formats (MX) v1.0 for E2M1, E8M0 and MXFP4; NVIDIA's NVFP4 for groups of 16
with E4M3 scales and one float32 scale for the whole tensor. Packed in pairs, the low nibble is the even column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Values of the E2M1 codes 0 to 7; codes 8 to 15 are their negatives (8 is negative zero).
E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are stored: E2M1 values in groups along K, one scale for each group."""

    name: str
    #: Values that share one scale, along K.
    group_size: int
    #: "e4m3" (float8_e4m3fn) or "e8m0" (a power of two, kept as uint8).
    scale: str
    #: Whether the tensor has one more float32 scale.
    has_global_scale: bool

    def __str__(self) -> str:
        return self.name

    def packed_bytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] tensor: packed values [n, k/2] and scales [n, k/group_size], global scale apart."""
        return n * (k // 2) + n * (k // self.group_size)


NVFP4: Final = Format(name="nvfp4", group_size=16, scale="e4m3", has_global_scale=True)
MXFP4: Final = Format(name="mxfp4", group_size=32, scale="e8m0", has_global_scale=False)
FORMATS: Final = {fmt.name: fmt for fmt in (NVFP4, MXFP4)}
