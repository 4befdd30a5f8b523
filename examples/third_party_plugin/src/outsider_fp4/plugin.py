"""What this plugin offers. halfbyte imports this module to decide, so nothing heavy may be imported here."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.hookspecs import hookimpl
from halfbyte.problems import Problem
from halfbyte.specs import Fidelity, KernelSpec, Proof
from outsider_fp4.known_bad import LUT_KNOWN_BAD


@hookimpl
def halfbyte_api_version() -> int:
    """Return the version of halfbyte's plugin API that this was written for."""
    return 1


@hookimpl
def halfbyte_kernels() -> Sequence[KernelSpec]:
    """Return the declaration of the one kernel."""
    return [
        KernelSpec(
            id="outsider.lut",
            op="linear",
            target="outsider_fp4.linear:LookUpTable",
            devices=("cpu",),
            schemes={"nvfp4-w4a16": Fidelity.EMULATED, "mxfp4-w4a16": Fidelity.EMULATED},
            dtypes=("bfloat16", "float16", "float32"),
            n_multiple=8,
            k_multiple=64,
            pads=True,
            global_scales="per-row",
            priority=150,
            proof=Proof.HARDWARE,
            known_bad=LUT_KNOWN_BAD,
            resident_bytes=resident_bytes,
        )
    ]


def resident_bytes(problem: Problem) -> int:
    """Return the bytes of the packed weights: half a byte for each, and a float32 scale for each group."""
    group = problem.scheme.weights.group_size
    return sum(n * k // 2 + 4 * n * k // group for n, k in problem.matrices)
