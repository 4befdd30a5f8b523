"""What every kernel of this plugin declares alike. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from halfbyte.machines import Machine
from halfbyte.problems import Problem
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity

#: Activations stay in 16 bits, whatever the checkpoint asks.
SCHEMES: Final[Mapping[str, Fidelity]] = {
    "nvfp4-w4a16": Fidelity.NATIVE,
    "mxfp4-w4a16": Fidelity.NATIVE,
    "nvfp4-w4a4": Fidelity.WEIGHT_ONLY,
    "mxfp4-w4a4": Fidelity.WEIGHT_ONLY,
}
DTYPES: Final = ("bfloat16", "float16")
ACTIVATIONS: Final = ("silu", "gelu_tanh", "relu2", "swigluoai")


def dtype_refusals(problem: Problem, machine: Machine) -> list[Refusal]:
    """Cards before SM80 have no bfloat16."""
    if problem.dtype != "bfloat16" or machine.capability is None or machine.capability >= 80:
        return []
    return [Refusal(Code.LIMIT, f"bfloat16 needs sm_80 or newer; this is {machine.arch}", "load the model in float16")]
