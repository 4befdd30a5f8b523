"""What compiling a kernel of CuTe DSL shows: the seconds, and the matrix products in its PTX."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: PTX of matrix products: SM10x's tensor memory, SM12x's registers.
PRODUCT = re.compile(r"(?:tcgen05\.mma|mma\.sync)\.[\w.:]*")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel that was compiled for a card."""

    kernel: str
    seconds: float
    products: frozenset[str]
    #: Whether it is a product of two FP4 matrices, all of whose instructions must be block-scaled.
    block_scaled: bool = False

    @property
    def ok(self) -> bool:
        """Whether it holds the instructions that it should."""
        return not self.block_scaled or (bool(self.products) and all("block_scale" in one for one in self.products))


def products(compiling: Callable[[], object], folder: Path) -> tuple[float, frozenset[str]]:
    """The seconds that compiling takes, and the instructions of matrix products in the PTX that it leaves."""
    for path in folder.rglob("*.ptx"):  # of the kernel before: they may have one name
        path.unlink()
    start = time.perf_counter()
    compiling()
    seconds = time.perf_counter() - start
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.ptx"))
    return seconds, frozenset(PRODUCT.findall(text))
