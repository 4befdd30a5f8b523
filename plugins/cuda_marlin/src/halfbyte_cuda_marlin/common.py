"""What every kernel of this plugin declares alike. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

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
