"""Kernel declarations for tests of decisions."""

from typing import Any

from halfbyte.schemes import SCHEMES
from halfbyte.specs import Fidelity, KernelSpec


def kernel(kernel_id: str = "test.kernel", **fields: Any) -> KernelSpec:
    """A kernel that can run anything, anywhere, except where `fields` say otherwise."""
    op = fields.pop("op", "linear")
    everything = {
        "target": "nowhere:Kernel",
        "devices": ("any",),
        "schemes": dict.fromkeys(SCHEMES, Fidelity.NATIVE),
        "dtypes": ("float32", "bfloat16", "float16"),
        "activations": ("silu", "gelu_tanh", "relu2", "swigluoai") if op == "experts" else (),
        "fuses_bias": True,
        "priority": 100,
    }
    return KernelSpec(**{"id": kernel_id, "op": op, **everything, **fields})


def plugged(*specs: KernelSpec) -> list[tuple[str, KernelSpec]]:
    """The kernels as `decide` takes them."""
    return [("test", spec) for spec in specs]
