"""The plugins of this project, as extras of the core distribution: which hardware each is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """One of our own plugins."""

    name: str
    distribution: str
    #: Device patterns (halfbyte.machines.matches) of the hardware it is for.
    devices: tuple[str, ...]
    #: What the ids of its kernels begin with.
    prefix: str

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f"pip install 'halfbyte[{self.name}]'"


EXTRAS: Final = (
    Extra(name="blackwell", distribution="halfbyte-cuda-blackwell", devices=("sm_100..",), prefix="flashinfer."),
    Extra(name="marlin", distribution="halfbyte-cuda-marlin", devices=("sm_75..",), prefix="marlin."),
    Extra(name="xpu", distribution="halfbyte-xpu", devices=("xpu",), prefix="xpu."),
)
