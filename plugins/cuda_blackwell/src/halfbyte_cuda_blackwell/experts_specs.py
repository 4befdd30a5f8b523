"""What FlashInfer's experts kernels declare. Torch-free. None yet."""

from __future__ import annotations

from typing import Final

from halfbyte.specs import KernelSpec

EXPERTS: Final[tuple[KernelSpec, ...]] = ()
