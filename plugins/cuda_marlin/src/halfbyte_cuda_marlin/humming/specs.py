"""What marlin.humming declares. Torch-free; humming is looked for by its metadata alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from halfbyte.problems import ExpertsProblem, Problem, bias_bytes, round_up
from halfbyte.specs import KernelSpec, Proof
from halfbyte_cuda_marlin.common import ACTIVATIONS, DTYPES, SCHEMES, dtype_refusals
from halfbyte_cuda_marlin.known_bad import KNOWN_BAD

#: What packing.py pads rows and columns to.
MULTIPLE: Final = 128


def _packed_bytes(problem: Problem) -> int:
    """Codes and scales of padded matrices, gate and up as one, and one float32 for each matrix."""
    fmt = problem.scheme.weights
    stacks, matrices = 1, problem.matrices
    if isinstance(problem, ExpertsProblem):
        fused = 2 * problem.intermediate if problem.gated else problem.intermediate
        stacks, matrices = problem.experts, ((fused, problem.hidden), (problem.hidden, problem.intermediate))
    padded = (fmt.packed_bytes(round_up(n, MULTIPLE), round_up(k, MULTIPLE)) + 4 for n, k in matrices)
    return stacks * sum(padded) + bias_bytes(problem)


_LINEAR: Final = KernelSpec(
    id="marlin.humming",
    op="linear",
    target="halfbyte_cuda_marlin.humming.linear:MarlinHumming",
    devices=("sm_75..sm_90",),
    # From torch 2.11 humming brings its launcher compiled; before, it needs a C++ compiler.
    requires=("humming-kernels>=0.1.19,<0.2", "torch>=2.11", "triton"),
    install="pip install 'halfbyte-cuda-marlin[humming]'",
    schemes=SCHEMES,
    dtypes=DTYPES,
    # Its kernels load and store 16 bytes at a time; packing.py pads further by itself.
    n_multiple=8,
    k_multiple=8,
    priority=240,
    proof={"sm_90": Proof.HARDWARE},
    known_bad=KNOWN_BAD.get("marlin.humming", ()),
    check=dtype_refusals,
    resident_bytes=_packed_bytes,
)

SPECS: Final = (
    _LINEAR,
    replace(
        _LINEAR,
        op="experts",
        target="halfbyte_cuda_marlin.humming.experts:MarlinHummingExperts",
        fuses_bias=True,
        activations=ACTIVATIONS,
        global_scales="",
    ),
)
