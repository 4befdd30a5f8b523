"""Combinations in which a kernel must not be chosen, as data: by op and kernel id.

Only what can happen with the FlashInfer versions that the kernels ask for is listed; docs/blackwell.md says what was
looked at besides. `fixed_in` is empty while the thread is open.
"""

from __future__ import annotations

from typing import Final

from halfbyte.specs import KnownBad

_FLASHINFER: Final = "https://github.com/flashinfer-ai/flashinfer"

KNOWN_BAD: Final[dict[tuple[str, str], tuple[KnownBad, ...]]] = {
    # Linear
    ("linear", "flashinfer.cudnn"): (
        KnownBad(
            devices=("sm_120..sm_121",),
            schemes=("nvfp4-*",),
            effect="cuDNN finds no execution plan for NVFP4 and the call raises",
            thread=f"{_FLASHINFER}/issues/2577",
        ),
    ),
    # Experts
    ("experts", "flashinfer.b12x"): (
        KnownBad(
            devices=("sm_121",),
            effect="an illegal memory access at the first call",
            thread=f"{_FLASHINFER}/issues/3170",
        ),
    ),
}


def known_bad(op: str, kernel_id: str) -> tuple[KnownBad, ...]:
    """What is known against a kernel."""
    return KNOWN_BAD.get((op, kernel_id), ())
