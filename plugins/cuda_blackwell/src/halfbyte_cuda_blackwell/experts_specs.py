"""What FlashInfer's experts kernels declare. Torch-free.

No Blackwell card has run any of them: `proof` says how far each was proved. cuTile's ran on an H200.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from halfbyte.machines import Machine
from halfbyte.problems import ExpertsProblem, Problem, bias_bytes, round_up
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity, KernelSpec, PriorityRule, Proof, Rounding
from halfbyte_cuda_blackwell.common import CUTLASS_DSL, FLASHINFER, INSTALL
from halfbyte_cuda_blackwell.known_bad import known_bad

_SM10X: Final = ("sm_100", "sm_103")
_SM12X: Final = ("sm_120", "sm_121")
_NATIVE, _WEIGHT_ONLY = Fidelity.NATIVE, Fidelity.WEIGHT_ONLY
#: cuTile's compiler; flashinfer-python brings cuda-tile without it. 13.2 has no Hopper.
_TILEIRAS: Final = "nvidia-cuda-tileiras>=13.3.36"
_MOST_B12X_EXPERTS: Final = 256


def _swizzled_bytes(problem: Problem) -> int:
    """Codes, scales in whole tiles of 128 rows x 4 columns, and a few numbers for each expert."""
    fmt = problem.scheme.weights
    codes = sum(n * k // 2 for n, k in problem.matrices)
    scales = sum(round_up(n, 128) * round_up(k // fmt.group_size, 4) for n, k in problem.matrices)
    return codes + scales + 32 * len(problem.matrices) + 2 * bias_bytes(problem)


def _trtllm_check(problem: Problem, machine: Machine) -> Sequence[Refusal]:
    """MXFP4 runs on SM100 alone; with NVFP4, biases and clamps come before products are scaled."""
    if not isinstance(problem, ExpertsProblem):
        return ()
    if not problem.scheme.weights.has_global_scale:
        if machine.arch == "sm_103":
            return (Refusal(Code.SCHEME, f"its MXFP4 kernels run on sm_100 alone; this is {machine.arch}"),)
        return ()
    refusals = []
    if problem.bias:
        refusals.append(Refusal(Code.LIMIT, "adds biases with MXFP4 weights only"))
    if problem.activation == "swigluoai" and problem.shared_global_scale is False:
        refusals.append(Refusal(Code.LIMIT, "clamps gate and up at one number before they are scaled, each by its own"))
    return refusals


def _b12x_check(problem: Problem, _: Machine) -> Sequence[Refusal]:
    """More experts than were seen to work: with 512 the kernels wrote out of bounds."""
    if not isinstance(problem, ExpertsProblem) or problem.experts <= _MOST_B12X_EXPERTS:
        return ()
    thread = "https://github.com/flashinfer-ai/flashinfer/issues/5446"
    return (
        Refusal(
            Code.LIMIT, f"{problem.experts} experts: above {_MOST_B12X_EXPERTS}, illegal memory accesses ({thread})"
        ),
    )


_B12X: Final = KernelSpec(
    id="flashinfer.b12x",
    op="experts",
    target="halfbyte_cuda_blackwell.experts_b12x:B12x",
    devices=_SM12X,
    requires=(FLASHINFER, CUTLASS_DSL),
    install=INSTALL,
    schemes={
        "nvfp4-w4a4": _NATIVE,
        "mxfp4-w4a4": _NATIVE,
        "nvfp4-w4a16": Fidelity.QUANTIZES_ACTIVATIONS,
        "mxfp4-w4a16": Fidelity.QUANTIZES_ACTIVATIONS,
    },
    dtypes=("bfloat16",),
    # Its static kernel pads the intermediate size to this itself, in a second copy of the weights.
    n_multiple=256,
    k_multiple=256,
    activations=("silu", "gelu_tanh", "relu2", "swigluoai"),
    gated_order="up-gate",
    # Input scales of one where a checkpoint has none: experts_packing.input_multipliers.
    activation_rounding=Rounding(scale="ceil", ties="even", input_scale=1.0),
    priority=460,
    proof=Proof.CONTRACT_DOUBLE,
    known_bad=known_bad("experts", "flashinfer.b12x"),
    check=_b12x_check,
    resident_bytes=_swizzled_bytes,
)

_B12X_A16: Final = KernelSpec(
    id="flashinfer.b12x-a16",
    op="experts",
    target="halfbyte_cuda_blackwell.experts_b12x:B12xA16",
    devices=_SM12X,
    requires=(FLASHINFER, CUTLASS_DSL),
    install=INSTALL,
    schemes={"nvfp4-w4a16": _NATIVE, "nvfp4-w4a4": _WEIGHT_ONLY},
    dtypes=("bfloat16",),
    n_multiple=128,
    k_multiple=128,
    activations=("silu", "relu2"),
    gated_order="up-gate",
    priority=260,
    proof=Proof.CONTRACT_DOUBLE,
    known_bad=known_bad("experts", "flashinfer.b12x-a16"),
)

_CUTLASS: Final = KernelSpec(
    id="flashinfer.cutlass",
    op="experts",
    target="halfbyte_cuda_blackwell.experts_cutlass:Cutlass",
    devices=(*_SM10X, *_SM12X),
    requires=(FLASHINFER,),
    install=INSTALL,
    schemes={"nvfp4-w4a4": _NATIVE},
    # Rows of up and of gate in whole tiles of scales: the kernel and its own check disagree about less.
    n_multiple=128,
    k_multiple=128,
    activations=("silu", "gelu_tanh", "relu2", "swigluoai"),
    gated_order="up-gate",
    activation_rounding=Rounding(ties="even"),
    priority=450,
    proof=Proof.CONTRACT_DOUBLE,
    known_bad=known_bad("experts", "flashinfer.cutlass"),
    resident_bytes=_swizzled_bytes,
)

_TRTLLM: Final = KernelSpec(
    id="flashinfer.trtllm",
    op="experts",
    target="halfbyte_cuda_blackwell.experts_trtllm:Trtllm",
    devices=_SM10X,
    requires=(FLASHINFER,),
    install=INSTALL,
    schemes={"mxfp4-w4a16": _NATIVE, "mxfp4-w4a4": _WEIGHT_ONLY, "nvfp4-w4a4": _NATIVE},
    dtypes=("bfloat16",),
    n_multiple=256,
    k_multiple=256,
    fuses_bias=True,
    activations=("silu", "swigluoai"),
    gated_order="up-gate",
    global_scales="per-projection",
    input_scales="one-for-x",
    activation_rounding=Rounding(ties="even"),
    priority=(PriorityRule(priority=420, schemes=("nvfp4-*",)), PriorityRule(priority=280)),
    proof=Proof.CONTRACT_DOUBLE,
    known_bad=known_bad("experts", "flashinfer.trtllm"),
    check=_trtllm_check,
    resident_bytes=_swizzled_bytes,
)

_CUTE_DSL: Final = KernelSpec(
    id="flashinfer.cute-dsl",
    op="experts",
    target="halfbyte_cuda_blackwell.experts_cute_dsl:CuteDsl",
    devices=_SM10X,
    requires=(FLASHINFER, CUTLASS_DSL),
    install=INSTALL,
    schemes={"nvfp4-w4a4": _NATIVE},
    dtypes=("bfloat16",),
    n_multiple=128,
    k_multiple=128,
    activations=("silu", "gelu_tanh", "relu2", "swigluoai"),
    gated_order="up-gate",
    input_scales="one",
    activation_rounding=Rounding(ties="even"),
    priority=430,
    proof=Proof.CONTRACT_DOUBLE,
    known_bad=known_bad("experts", "flashinfer.cute-dsl"),
    resident_bytes=_swizzled_bytes,
)

_CUTE_DSL_A16: Final = replace(
    _CUTE_DSL,
    id="flashinfer.cute-dsl-a16",
    target="halfbyte_cuda_blackwell.experts_cute_dsl:CuteDslA16",
    schemes={"nvfp4-w4a16": _NATIVE, "nvfp4-w4a4": _WEIGHT_ONLY},
    input_scales="per-expert",
    activation_rounding=None,
    priority=280,
    known_bad=known_bad("experts", "flashinfer.cute-dsl-a16"),
)

_CUTILE: Final = KernelSpec(
    id="flashinfer.cutile",
    op="experts",
    target="halfbyte_cuda_blackwell.experts_cutile:CuTile",
    devices=("sm_89", "sm_90", *_SM12X),
    requires=(FLASHINFER, _TILEIRAS),
    install="pip install 'halfbyte[blackwell]' 'cuda-tile[tileiras]'",
    schemes={
        "nvfp4-w4a16": _NATIVE,
        "mxfp4-w4a16": _NATIVE,
        "nvfp4-w4a4": _WEIGHT_ONLY,
        "mxfp4-w4a4": _WEIGHT_ONLY,
    },
    dtypes=("bfloat16",),
    n_multiple=64,
    k_multiple=64,
    activations=("silu", "gelu_tanh", "relu2", "swigluoai"),
    gated_order="up-gate",
    global_scales="per-projection",
    # Below every Marlin kernel on cards without FP4 hardware: on an H200 it took 8.7 to 19 times marlin.cuda's time.
    # Above b12x-a16: the same code ran on another card, that one nowhere.
    priority=(PriorityRule(priority=230, devices=("sm_89", "sm_90")), PriorityRule(priority=270)),
    proof={"sm_90": Proof.HARDWARE, "any": Proof.CONTRACT_DOUBLE},
    known_bad=known_bad("experts", "flashinfer.cutile"),
    resident_bytes=_swizzled_bytes,
)

EXPERTS: Final = (_B12X, _CUTLASS, _CUTE_DSL, _TRTLLM, _CUTE_DSL_A16, _CUTILE, _B12X_A16)
