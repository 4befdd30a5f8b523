"""What vLLM's Marlin declares. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from halfbyte.machines import Machine
from halfbyte.problems import ExpertsProblem, Problem, bias_bytes
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import KernelSpec, Proof
from halfbyte_cuda_marlin.common import ACTIVATIONS, DTYPES, SCHEMES, dtype_refusals
from halfbyte_cuda_marlin.known_bad import KNOWN_BAD
from halfbyte_cuda_marlin.vllm.requirements import requirements
from halfbyte_cuda_marlin.vllm.shapes import MAX_EXPERTS, padded_intermediate, padded_rows

_FP16_GROUP: Final = 16


def _packed_bytes(problem: Problem) -> int:
    """Codes, one byte for each group's scale, and a float32 for each matrix."""
    fmt = problem.scheme.weights
    # Marlin knows E8M0 scales in bfloat16 alone; beside float16 they are kept as NVFP4's.
    group = _FP16_GROUP if problem.dtype == "float16" else fmt.group_size
    if isinstance(problem, ExpertsProblem):
        problem = replace(problem, intermediate=padded_intermediate(problem.hidden, problem.intermediate))
        matrices = problem.matrices
    else:
        matrices = tuple((padded_rows(n, k), k) for n, k in problem.matrices)
    return sum(n * k // 2 + n * k // group + 4 for n, k in matrices) + bias_bytes(problem)


def _limits(problem: Problem, machine: Machine) -> Sequence[Refusal]:
    refusals = dtype_refusals(problem, machine)
    if isinstance(problem, ExpertsProblem) and problem.experts > MAX_EXPERTS:
        refusals.append(Refusal(Code.LIMIT, f"{problem.experts} experts are more than {MAX_EXPERTS}"))
    return refusals


_LINEAR: Final = KernelSpec(
    id="marlin.vllm",
    op="linear",
    target="halfbyte_cuda_marlin.vllm.linear:MarlinVllm",
    devices=("sm_75..",),
    requires=requirements(),
    install="pip install 'vllm>=0.26'",
    schemes=SCHEMES,
    dtypes=DTYPES,
    n_multiple=64,
    k_multiple=64,
    priority=250,
    proof={"sm_90": Proof.HARDWARE},
    known_bad=KNOWN_BAD.get("marlin.vllm", ()),
    check=_limits,
    resident_bytes=_packed_bytes,
)

SPECS: Final = (
    _LINEAR,
    replace(
        _LINEAR,
        op="experts",
        target="halfbyte_cuda_marlin.vllm.experts:MarlinVllmExperts",
        fuses_bias=True,
        activations=ACTIVATIONS,
        global_scales="per-expert",
    ),
)
