"""Numbers as people read them."""

from __future__ import annotations


def size_text(size: int) -> str:
    """A number of bytes with its unit: "640 B", "1.5 GiB"."""
    value, units = float(size), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if value < 1024 or unit == units[-1]:
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
