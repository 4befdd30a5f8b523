"""The CPU and its memory."""

from __future__ import annotations

import os
from pathlib import Path

from halfbyte.probe.device import Device


def cpu_device() -> Device:
    """The CPU, with the main memory that this process may use."""
    import platform

    return Device(name="cpu", arch="cpu", product=platform.processor() or platform.machine(), memory=_memory())


def _memory() -> int | None:
    """Bytes of main memory, or of the control group that this process lives in if that has less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total
    return min(total, limit)
