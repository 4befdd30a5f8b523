"""Where the layers of a checkpoint are stored: which tensor plays which role. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from halfbyte.checkpoints.headers import TensorInfo
from halfbyte.problems import Problem
from halfbyte.schemes import Scheme

Role = Literal["weight", "gate", "up", "down"]

#: Spellings of the projections of one expert; Mixtral's w1, w3 and w2 are gate, up and down.
PROJECTIONS: Final[Mapping[str, Role]] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
_EXPERT: Final = re.compile(r"(?P<layer>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSource:
    """One FP4 matrix [n, k] in the checkpoint. Its layout is checked, its global scales are read."""

    #: The module, or the fused parameter, as the checkpoint spells it.
    name: str
    #: The layer it belongs to, and as what. Experts are numbered.
    layer: str
    role: Role
    expert: int | None
    scheme: Scheme
    n: int
    k: int
    #: U8 [n, k/2]; or U8 [E, rows, k/32, 16] with the rows of several matrices and experts, see `fused`.
    packed: TensorInfo
    #: [n, k/group_size] or [E, rows, k/group_size]: F8_E4M3, or E8M0 as U8 or F8_E8M0.
    scales: TensorInfo
    #: Multipliers, whatever the checkpoint stores. The second is None unless the scheme quantizes activations.
    global_scale: float | None = None
    input_global_scale: float | None = None
    #: [n] or [E, rows], floating point.
    bias: TensorInfo | None = None
    #: (first row, step) where a tensor holds all experts; None where it is this matrix alone.
    fused: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a dialect found: the matrices, the tensors that they use, and tensors of theirs that nothing needs."""

    matrices: tuple[MatrixSource, ...]
    used: frozenset[str]
    ignored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def without_cache_quantization(self) -> Found:
        """The same, with the note that the key-value cache's quantization, which the configuration asks for, is not."""
        note = "the key-value cache's quantization is not applied: keys and values stay unquantized"
        return replace(self, notes=(*self.notes, note))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One quantized layer: its name as the checkpoint spells it, its problem, and where its matrices are.

    A linear layer has one source, "weight". Experts have "gate" (unless they are ungated), "up" and "down", each with
    one source per expert in order.
    """

    name: str
    problem: Problem
    sources: Mapping[Role, tuple[MatrixSource, ...]]


def place(module: str, packed: TensorInfo) -> tuple[str, Role, int | None]:
    """(layer, role, expert) of a module by its path: "...experts.3.up_proj" is expert 3's up of "...experts"."""
    match = _EXPERT.fullmatch(module)
    if match is None:
        return module, "weight", None
    projection = match["projection"]
    if projection not in PROJECTIONS:
        raise packed.error(f"unknown projection {projection!r} of an expert; known: {', '.join(PROJECTIONS)}")
    return match["layer"], PROJECTIONS[projection], int(match["expert"])
