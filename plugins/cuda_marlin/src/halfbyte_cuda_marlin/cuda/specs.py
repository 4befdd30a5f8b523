"""What our own kernels declare. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from halfbyte.problems import Problem, bias_bytes, round_up
from halfbyte.specs import KernelSpec, PriorityRule, Proof
from halfbyte_cuda_marlin.common import ACTIVATIONS, DTYPES, SCHEMES
from halfbyte_cuda_marlin.known_bad import KNOWN_BAD


def _packed_bytes(problem: Problem) -> int:
    """Units of 32 rows x 128 columns with their scales, and one float32 for each row, of every matrix."""
    scales = 256 if problem.scheme.weights.has_global_scale else 128
    rows = [(round_up(n, 32), round_up(k, 128)) for n, k in problem.matrices]
    return sum(n // 32 * (k // 128) * (2048 + scales) + 4 * n for n, k in rows) + bias_bytes(problem)


_LINEAR: Final = KernelSpec(
    id="marlin.cuda",
    op="linear",
    target="halfbyte_cuda_marlin.cuda.linear:MarlinCuda",
    devices=("sm_80..",),
    requires=("cuda-bindings>=12.8",),
    install="pip install 'halfbyte[marlin]'",
    schemes=SCHEMES,
    dtypes=DTYPES,
    fuses_bias=True,
    global_scales="per-row",
    # Where it was not run yet, libraries that their makers run there come first.
    priority=(PriorityRule(priority=310, devices=("sm_90",)), PriorityRule(priority=220)),
    proof={"sm_90": Proof.HARDWARE},
    known_bad=KNOWN_BAD.get("marlin.cuda", ()),
    resident_bytes=_packed_bytes,
)

SPECS: Final = (
    _LINEAR,
    replace(
        _LINEAR,
        op="experts",
        target="halfbyte_cuda_marlin.cuda.experts:MarlinCudaExperts",
        devices=("sm_90",),
        n_multiple=32,
        k_multiple=32,
        activations=ACTIVATIONS,
        global_scales="per-projection",
    ),
)
