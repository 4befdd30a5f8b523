"""Checkpoint readers. Planning is torch-free; `Checkpoint`, which reads weights, is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.checkpoints.headers import TensorInfo
from halfbyte.checkpoints.plan import Plan, plan
from halfbyte.checkpoints.sources import LayerPlan, MatrixSource

if TYPE_CHECKING:
    from halfbyte.checkpoints.reader import Checkpoint

__all__ = ["Checkpoint", "LayerPlan", "MatrixSource", "Plan", "TensorInfo", "plan"]


def __getattr__(name: str) -> Any:
    if name == "Checkpoint":
        from halfbyte.checkpoints.reader import Checkpoint

        return Checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
