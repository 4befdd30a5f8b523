"""What our own kernels declare. Torch-free."""

from __future__ import annotations

from typing import Final

from halfbyte.problems import Problem, bias_bytes, round_up
from halfbyte.specs import Fidelity, KernelSpec, Proof
from halfbyte_cuda_marlin.known_bad import KNOWN_BAD


def _packed_bytes(problem: Problem) -> int:
    """Units of 32 rows x 128 columns with their scales, and one float32 for each row."""
    scales = 256 if problem.scheme.weights.has_global_scale else 128
    ((n, k),) = problem.matrices
    rows = round_up(n, 32)
    return rows // 32 * (round_up(k, 128) // 128) * (2048 + scales) + 4 * rows + bias_bytes(problem)


SPECS: Final = (
    KernelSpec(
        id="marlin.cuda",
        op="linear",
        target="halfbyte_cuda_marlin.cuda.linear:MarlinCuda",
        devices=("sm_90",),
        requires=("cuda-bindings>=12.8",),
        install="pip install 'halfbyte[marlin]'",
        schemes={
            "nvfp4-w4a16": Fidelity.NATIVE,
            "mxfp4-w4a16": Fidelity.NATIVE,
            "nvfp4-w4a4": Fidelity.WEIGHT_ONLY,
            "mxfp4-w4a4": Fidelity.WEIGHT_ONLY,
        },
        dtypes=("bfloat16", "float16"),
        fuses_bias=True,
        global_scales="per-row",
        priority=310,
        proof={"sm_90": Proof.HARDWARE},
        known_bad=KNOWN_BAD.get("marlin.cuda", ()),
        resident_bytes=_packed_bytes,
    ),
)
