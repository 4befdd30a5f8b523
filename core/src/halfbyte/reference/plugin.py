"""The built-in plugin: what the reference kernels declare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from halfbyte.hookspecs import hookimpl
from halfbyte.problems import ACTIVATIONS, DTYPES, Problem, dequantized_bytes, packed_bytes
from halfbyte.schemes import SCHEMES
from halfbyte.specs import API_VERSION, Fidelity, KernelSpec, Proof, Rounding

#: Every E4M3 code times a global scale: 256 float32 numbers.
_TABLE_BYTES: Final = 1024


@hookimpl
def halfbyte_api_version() -> int:
    """The contract that these kernels were written for: this version's own."""
    return API_VERSION


@hookimpl
def halfbyte_kernels() -> Sequence[KernelSpec]:
    """`reference` keeps the weights packed, `dequantized` trades memory for speed; each for both operations."""
    return [_spec(kernel_id, op) for op in ("linear", "experts") for kernel_id in ("reference", "dequantized")]


def _spec(kernel_id: str, op: str) -> KernelSpec:
    packed = kernel_id == "reference"
    return KernelSpec(
        id=kernel_id,
        op=op,
        target=f"halfbyte.reference.{op}:{'Reference' if packed else 'Dequantized'}",
        devices=("any",),
        schemes=dict.fromkeys(SCHEMES, Fidelity.EMULATED),
        dtypes=tuple(DTYPES),
        fuses_bias=True,
        activations=ACTIVATIONS if op == "experts" else (),
        global_scales="per-row" if op == "linear" else "per-projection",
        activation_rounding=Rounding(scale="even", ties="even"),
        priority=10 if packed else 20,
        proof={"cpu": Proof.HARDWARE, "sm_90": Proof.HARDWARE},
        keeps="packed" if packed else "dequantized",
        resident_bytes=_packed_bytes if packed else _dequantized_bytes,
    )


def _packed_bytes(problem: Problem) -> int:
    """As the checkpoint stores it, and the table of every matrix with a global scale; for weights in one part."""
    tables = len(problem.matrices) if problem.scheme.weights.has_global_scale else 0
    return packed_bytes(problem) + _TABLE_BYTES * tables + _input_bytes(problem)


def _dequantized_bytes(problem: Problem) -> int:
    return dequantized_bytes(problem) + _input_bytes(problem)


def _input_bytes(problem: Problem) -> int:
    """Divisor (float32) and table of the input's scale of every matrix, where activations have a global scale."""
    activations = problem.scheme.activations
    if activations is None or not activations.has_global_scale:
        return 0
    return (4 + _TABLE_BYTES) * len(problem.matrices)
