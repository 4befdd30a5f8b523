"""What probing finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that this machine has."""

    #: What torch calls it: "cpu", "cuda:0", "xpu:1"; "pci:ADDRESS" for one that torch does not list.
    name: str
    #: As in machines.py, and "rocm", "xpu" (a family without a name here), "mps", ...; "": halfbyte cannot use it.
    arch: str
    product: str
    memory: int | None = None
    driver: str = ""
    #: What is not certain about it, and how to make it so.
    note: str = ""
