"""What `xpu.scaled-mm` declares. Torch-free."""

from __future__ import annotations

from typing import Final

from halfbyte.machines import Machine
from halfbyte.problems import Problem, packed_bytes
from halfbyte.refusals import Refusal
from halfbyte.specs import Fidelity, KernelSpec, Proof, Rounding
from halfbyte_xpu.devices import WITH_FP4, without_fp4

#: Every E4M3 code times the input's global scale, in float32.
_TABLE_BYTES: Final = 1024


def _check(problem: Problem, machine: Machine) -> list[Refusal]:  # noqa: ARG001 - what a check is called with
    return without_fp4(machine)


def _resident_bytes(problem: Problem) -> int:
    """As stored; for NVFP4 also the two global scales, and the table of the input's."""
    return packed_bytes(problem) + (_TABLE_BYTES + 12 if problem.scheme.weights.has_global_scale else 0)


SPECS: Final = (
    KernelSpec(
        id="xpu.scaled-mm",
        op="linear",
        target="halfbyte_xpu.torch_xpu.linear:ScaledMm",
        devices=WITH_FP4,
        requires=("torch>=2.14",),
        install="pip install 'torch>=2.14' --index-url https://download.pytorch.org/whl/xpu",
        schemes={"nvfp4-w4a4": Fidelity.NATIVE, "mxfp4-w4a4": Fidelity.NATIVE},
        # What torch's own check on an XPU asks for: N and the bytes of a row are multiples of 16.
        n_multiple=16,
        k_multiple=32,
        activation_rounding=Rounding(scale="even", ties="even"),
        priority=220,
        proof=Proof.CONTRACT_DOUBLE,
        check=_check,
        resident_bytes=_resident_bytes,
    ),
)
