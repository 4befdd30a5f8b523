"""One kernel for each fault: the built-in reference with that fault, for few schemes and dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.hookspecs import hookimpl
from halfbyte.specs import Fidelity, KernelSpec, Rounding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from halfbyte.machines import Machine
    from halfbyte.problems import Problem
    from halfbyte.refusals import Refusal

#: Fault (a class in linear.py or experts.py, in lower case with dashes) to what its declaration says differently.
LINEAR: dict[str, dict[str, Any]] = {
    "no-fault": {},
    "swapped-nibbles": {},
    "ignored-global-scale": {},
    "one-global-scale": {},
    "ignored-bias": {},
    "last-tile-missing": {},
    "clamped-scales": {"schemes": ("mxfp4-w4a16",)},
    "other-rounding": {"schemes": ("mxfp4-w4a4",)},
    "quantizes-secretly": {},
    "half-precision": {},
    "changes-weights": {},
    "keeps-weights": {},
    "float8-tensors": {},
    "hidden-copies": {},
    "random-noise": {},
    "reused-result": {},
    "changes-input": {},
    "other-strides": {},
    "own-input-back": {},
    "leaves-the-device": {},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "no-fault": {},
    "gate-for-up": {},
    "ignored-router-weights": {},
    "ignored-expert-bias": {},
    "global-numbers": {},
    "first-expert-only": {},
    "wrong-activation": {},
    "one-scale-for-both": {"schemes": ("nvfp4-w4a4",)},
    "largest-input-scale": {"schemes": ("nvfp4-w4a4",)},
    "largest-hidden-scale": {"schemes": ("nvfp4-w4a4",), "input_scales": "one-for-x"},
    "one-input-scale": {"schemes": ("nvfp4-w4a4",), "input_scales": "one"},
    "one-input-scale-for-x": {"schemes": ("nvfp4-w4a4",), "input_scales": "one-for-x"},
    "fixed-input-scale": {
        "fidelity": Fidelity.QUANTIZES_ACTIVATIONS,
        "activation_rounding": Rounding(input_scale=1.5),
    },
    "other-input-scale": {
        "fidelity": Fidelity.QUANTIZES_ACTIVATIONS,
        "activation_rounding": Rounding(input_scale=1.5),
    },
}


@hookimpl
def halfbyte_api_version() -> int:
    return 1


@hookimpl
def halfbyte_kernels() -> Sequence[KernelSpec]:
    return [
        *(_spec("linear", name, **changes) for name, changes in LINEAR.items()),
        *(_spec("experts", name, **changes) for name, changes in EXPERTS.items()),
        _spec("linear", "check-that-raises", target="NoFault", check=_raises),
        _spec("linear", "vendor-library", devices=("sm_100",), requires=("doubled-vendor>=2",)),
    ]


def _spec(
    op: str,
    name: str,
    target: str = "",
    schemes: Sequence[str] = ("nvfp4-w4a16",),
    fidelity: Fidelity = Fidelity.EMULATED,
    **changes: Any,
) -> KernelSpec:
    target = target or "".join(word.capitalize() for word in name.split("-"))
    fields: dict[str, Any] = {
        "devices": ("any",),
        "dtypes": ("float32",),
        "fuses_bias": True,
        "activations": ("silu", "swigluoai") if op == "experts" else (),
        "global_scales": "per-row" if op == "linear" else "per-projection",
        "activation_rounding": Rounding(),
        **changes,
    }
    return KernelSpec(
        id=f"mutant.{name}",
        op=op,
        target=f"halfbyte_mutants.{op}:{target}",
        schemes=dict.fromkeys(schemes, fidelity),
        priority=0,
        auto=False,
        **fields,
    )


def _raises(problem: Problem, machine: Machine) -> Sequence[Refusal]:
    raise RuntimeError("not today")
