"""What vLLM's compiled operators need, read from its metadata. Torch-free."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from typing import Final

from packaging.requirements import Requirement

#: The first release whose operators were called from here.
VLLM: Final = "vllm>=0.26"


def requirements() -> tuple[str, ...]:
    """VLLM, and the torch that the installed vllm names: its libraries are built for that one."""
    try:
        lines = requires("vllm") or []
    except PackageNotFoundError:
        return (VLLM,)
    # Parsing all of its hundred lines would be felt whenever halfbyte starts.
    about = (Requirement(line) for line in lines if line.startswith("torch"))
    own = (one for one in about if one.name == "torch" and (one.marker is None or one.marker.evaluate({"extra": ""})))
    return (VLLM, *(f"torch{one.specifier}" for one in own))
