"""Experts over the emulated library: what the conformance kit does not look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

from cuda_blackwell.experts_emulator.b12x import B12x
from cuda_blackwell.experts_emulator.patches import emulated
from cuda_blackwell.flashinfer_emulator import arithmetic
from cuda_blackwell.flashinfer_emulator.patches import card
from halfbyte import FP4Experts, Policy, describe, resolve
from halfbyte.conformance import data, oracle
from halfbyte.conformance.tolerances import errors, tolerance
from halfbyte.errors import CheckpointError, PluginError, UsageError
from halfbyte.kernels import ExpertsKernel, Packed, load_kernel
from halfbyte.problems import ExpertsProblem, InputScales
from halfbyte.refusals import Code
from halfbyte.schemes import SCHEMES
from halfbyte.specs import Fidelity, Rounding
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_blackwell.experts_packing import beyond, local_numbers
from halfbyte_cuda_blackwell.experts_specs import EXPERTS

SPECS = {spec.id.removeprefix("flashinfer."): spec for spec in EXPERTS}
EXPERTS_COUNT, SIZE = 4, 256


@pytest.fixture
def hopper() -> Iterator[None]:
    with emulated(90):
        yield


@pytest.fixture
def sm100() -> Iterator[None]:
    with emulated(100):
        yield


@pytest.fixture
def sm120() -> Iterator[B12x]:
    with emulated(120) as b12x:
        yield b12x


def layer(scheme: str, *, shared: bool = True, input_scales: InputScales = "one") -> ExpertsWeights:
    return data.experts_weights(
        SCHEMES[scheme], EXPERTS_COUNT, SIZE, SIZE, dtype=torch.bfloat16, shared=shared, input_scales=input_scales
    )


def packed(kernel: str, weights: ExpertsWeights, *, top_k: int = 2, activation: str = "silu") -> Packed:
    problem = weights.problem(torch.bfloat16, top_k=top_k, activation=activation)
    experts = load_kernel(SPECS[kernel])
    assert isinstance(experts, ExpertsKernel)
    return Packed(problem, experts.prepare(weights, problem))


def run(kernel: str, own: Packed, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    experts = load_kernel(SPECS[kernel])
    assert isinstance(experts, ExpertsKernel)
    return experts.apply(x, own, ids, weights)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def test_trtllm_refuses_clamps_of_gate_and_up_that_only_the_weights_tell_have_two_scales(sm100: None):
    with pytest.raises(UsageError, match="clamps gate and up at one number, and their global scales cannot"):
        packed("trtllm", layer("nvfp4-w4a4", shared=False), activation="swigluoai")


def test_trtllm_scales_the_hidden_activations_of_each_expert_by_its_own_scale(sm100: None):
    weights = layer("nvfp4-w4a4", input_scales="one-for-x")
    own, hidden, down = packed("trtllm", weights), weights.down.input_global_scale, weights.down.global_scale
    assert hidden is not None
    assert down is not None
    assert len(hidden.unique()) == EXPERTS_COUNT
    assert torch.equal(own["down_scale"], (hidden * down).float())


def test_b12x_without_calibrated_inputs_is_right_to_flashinfers_tolerance(sm120: B12x):
    weights = layer("nvfp4-w4a16")
    own = packed("b12x", weights)
    assert torch.equal(own["w1_input"], torch.ones(EXPERTS_COUNT))
    assert torch.equal(own["w2_input"], torch.ones(EXPERTS_COUNT))
    x, routing = data.activations(33, SIZE, torch.bfloat16), data.routing(33, EXPERTS_COUNT, 2)
    expected = oracle.experts(x, weights, *routing, activation="silu", rounding=None)
    assert cosine(run("b12x", own, x, *routing), expected.values) > 0.97


def test_b12x_does_not_quantize_the_activations_of_a_weight_only_checkpoint_unless_it_is_allowed():
    problem = ExpertsProblem(scheme=SCHEMES["nvfp4-w4a16"], experts=8, top_k=2, hidden=2048, intermediate=768)
    refused = resolve(problem, describe("sm_120"), Policy(prefer="flashinfer.b12x"))
    own = next(candidate for candidate in refused.candidates if candidate.spec.id == "flashinfer.b12x")
    assert own.state == "blocked"
    assert refused.chosen().spec.id != "flashinfer.b12x"
    demand = Policy(prefer="flashinfer.b12x", activations="allow-quantized", fidelity=Fidelity.QUANTIZES_ACTIVATIONS)
    assert resolve(problem, describe("sm_120"), demand).chosen().spec.id == "flashinfer.b12x"


def test_b12x_derives_from_the_weights_once(sm120: B12x):
    """The library keeps what it derives for as long as the very tensors live that it was given."""
    weights = layer("nvfp4-w4a4")
    resolution = resolve(
        weights.problem(torch.bfloat16, top_k=2, activation="silu"),
        describe("sm_120"),
        Policy(require="flashinfer.b12x"),
    )
    module = FP4Experts(
        weights,
        top_k=2,
        activation="silu",
        resolution=replace(resolution, machine=describe("cpu")),
    )
    x, routing = data.activations(3, SIZE, torch.bfloat16), data.routing(3, EXPERTS_COUNT, 2)
    with torch.no_grad():
        for _ in range(3):
            module(x, *routing)
        torch.compile(module, backend="aot_eager", fullgraph=True)(x, *routing)
    assert len(sm120.made) == 1


def test_the_global_scales_stay_out_of_the_block_scales(sm100: None):
    weights = layer("nvfp4-w4a4", shared=True)
    own = packed("cutlass", weights)
    stored = own["w1_scales"].flatten(1)[:, arithmetic.offsets(2 * SIZE, SIZE // 16, 128)]
    assert weights.gate is not None
    assert torch.equal(stored[:, :SIZE], weights.up.scales.view(torch.uint8))
    assert torch.equal(stored[:, SIZE:], weights.gate.scales.view(torch.uint8))
    up, inputs = weights.up.global_scale, weights.up.input_global_scale
    assert up is not None
    assert inputs is not None
    assert torch.equal(own["w1_alpha"], (up * inputs).float())
    assert len(own["w1_alpha"].unique()) == EXPERTS_COUNT


def test_gate_and_up_keep_a_global_scale_each_in_cutile(hopper: None):
    weights = layer("nvfp4-w4a16", shared=False)
    own = packed("cutile", weights)
    assert weights.gate is not None
    assert weights.gate.global_scale is not None
    assert weights.up.global_scale is not None
    expected = torch.stack((weights.gate.global_scale, weights.up.global_scale), dim=1).float()
    assert torch.equal(own["w1_global_scale"], expected)  # the library turns up and gate


def test_trtllm_clamps_before_it_scales(sm100: None):
    weights = layer("nvfp4-w4a4")
    x, routing = data.activations(33, SIZE, torch.bfloat16, kind="outliers"), data.routing(33, EXPERTS_COUNT, 2)
    y = run("trtllm", packed("trtllm", weights, activation="swigluoai"), x, *routing)
    expected = oracle.experts(x, weights, *routing, activation="swigluoai", rounding=Rounding())
    assert errors(y, expected).within(tolerance("experts", "nvfp4", "bfloat16", quantizes=True))


@pytest.mark.parametrize(
    ("input_scales", "shared", "able"),
    [
        ("one", True, ("cutlass", "cute-dsl", "trtllm", "cute-dsl-a16")),
        ("one-for-x", True, ("cutlass", "trtllm", "cute-dsl-a16")),
        ("per-expert", True, ("cutlass", "cute-dsl-a16")),
        ("one", False, ("trtllm",)),
        ("per-expert", False, ()),
    ],
)
@pytest.mark.parametrize("machine", ["sm_100", "sm_103"])
def test_kernels_that_quantize_x_once_run_where_the_experts_share_an_input_scale(
    machine: str, input_scales: InputScales, shared: bool, able: tuple[str, ...]
):
    problem = ExpertsProblem(
        scheme=SCHEMES["nvfp4-w4a4"],
        experts=8,
        top_k=2,
        hidden=2048,
        intermediate=768,
        shared_global_scale=shared,
        input_scales=input_scales,
    )
    candidates = resolve(problem, describe(machine)).candidates
    ours = [one for one in candidates if one.spec in EXPERTS]
    assert tuple(one.spec.id.removeprefix("flashinfer.") for one in ours if not one.refusals) == able
    refused = {one.spec.id: {refusal.code for refusal in one.refusals} for one in ours}
    assert (Code.INPUT_SCALES in refused["flashinfer.cute-dsl"]) == (input_scales != "one")
    assert (Code.INPUT_SCALES in refused["flashinfer.trtllm"]) == (input_scales == "per-expert")


@pytest.mark.parametrize(
    ("kernel", "scheme", "machine"),
    [
        ("cute-dsl-a16", "nvfp4-w4a16", "sm_103"),
        ("trtllm", "mxfp4-w4a16", "sm_100"),
        ("trtllm", "mxfp4-w4a4", "sm_100"),
    ],
)
def test_what_leaves_activations_alone_is_not_blocked(kernel: str, scheme: str, machine: str):
    problem = ExpertsProblem(scheme=SCHEMES[scheme], experts=8, top_k=2, hidden=2048, intermediate=768)
    own = next(one for one in resolve(problem, describe(machine)).candidates if one.spec is SPECS[kernel])
    assert own.state in ("selected", "outranked")


def test_cutile_takes_more_tokens_than_its_buffers(hopper: None, monkeypatch: pytest.MonkeyPatch):
    from halfbyte_cuda_blackwell import experts_cutile

    own = packed("cutile", layer("mxfp4-w4a16"))
    x, routing = data.activations(33, SIZE, torch.bfloat16), data.routing(33, EXPERTS_COUNT, 2)
    whole = run("cutile", own, x, *routing)
    monkeypatch.setattr(experts_cutile, "_TOKENS", 8)
    experts_cutile._layer.cache_clear()
    assert (run("cutile", own, x, *routing) - whole).abs().max() <= 2**-7 * whole.abs().max()  # sums in other orders


@pytest.mark.parametrize("kernel", ["cutlass", "cute-dsl", "trtllm"])
def test_a_checkpoint_without_input_scales_is_refused_by_name(sm100: None, kernel: str):
    weights = layer("nvfp4-w4a4")
    bare = replace(weights, down=replace(weights.down, input_global_scale=None))
    with pytest.raises(CheckpointError, match="calibrate the checkpoint anew"):
        packed(kernel, bare)


@pytest.mark.parametrize(("kernel", "scheme"), [("cutlass", "nvfp4-w4a4"), ("trtllm", "mxfp4-w4a16")])
def test_cards_before_blackwell_are_refused(kernel: str, scheme: str):
    with card(90), pytest.raises(UsageError, match="sm_90"):
        packed(kernel, layer(scheme))


def test_b12x_is_refused_below_cuda_13():
    with card(120, cuda="12.9"), pytest.raises(PluginError, match=r"CUDA 13\.0"):
        packed("b12x", layer("nvfp4-w4a4"))


def test_an_activation_is_quantized_on_blackwell_alone(sm100: None):
    own = packed("trtllm", layer("nvfp4-w4a4"))
    x, routing = data.activations(3, SIZE, torch.bfloat16), data.routing(3, EXPERTS_COUNT, 2)
    with card(90), pytest.raises(UsageError, match="quantizes to FP4 from sm_100"):
        run("trtllm", own, x, *routing)


@pytest.mark.parametrize(
    ("kernel", "scheme", "machine", "changes", "code"),
    [
        ("trtllm", "mxfp4-w4a16", "sm_103", {}, Code.SCHEME),
        ("trtllm", "nvfp4-w4a4", "sm_100", {"bias": True}, Code.LIMIT),
        ("trtllm", "nvfp4-w4a4", "sm_100", {"activation": "swigluoai", "shared_global_scale": False}, Code.LIMIT),
        ("cutlass", "nvfp4-w4a4", "sm_100", {"shared_global_scale": False}, Code.GLOBAL_SCALES),
        ("b12x", "nvfp4-w4a4", "sm_120", {"experts": 512}, Code.LIMIT),
        ("cutlass", "nvfp4-w4a4", "sm_100", {"bias": True}, Code.BIAS),
        ("b12x-a16", "nvfp4-w4a16", "sm_120", {"activation": "gelu_tanh"}, Code.ACTIVATION),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(
    kernel: str, scheme: str, machine: str, changes: dict[str, Any], code: Code
):
    problem = ExpertsProblem(scheme=SCHEMES[scheme], experts=8, top_k=2, hidden=2048, intermediate=768)
    resolution = resolve(replace(problem, **changes), describe(machine))
    own = next(candidate for candidate in resolution.candidates if candidate.spec is SPECS[kernel])
    assert code in {refusal.code for refusal in own.refusals}


def test_biases_of_gpt_oss_are_added(sm100: None):
    weights = data.experts_weights(SCHEMES["mxfp4-w4a16"], EXPERTS_COUNT, SIZE, SIZE, dtype=torch.bfloat16, bias=True)
    x, routing = data.activations(5, SIZE, torch.bfloat16), data.routing(5, EXPERTS_COUNT, 2)
    y = run("trtllm", packed("trtllm", weights, activation="swigluoai"), x, *routing)
    expected = oracle.experts(x, weights, *routing, activation="swigluoai", rounding=None)
    assert errors(y, expected).within(tolerance("experts", "mxfp4", "bfloat16", quantizes=False))


def test_experts_of_another_rank_have_numbers_of_their_own():
    expert_map = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
    local = local_numbers(torch.tensor([[0, 2], [1, 3], [3, 0]], dtype=torch.int32), expert_map)
    assert local.tolist() == [[-1, -1], [0, 1], [1, -1]]
    assert beyond(local, 2).tolist() == [[2, 3], [0, 1], [1, 3]]


def test_only_the_kernel_of_the_thread_is_refused_above_256_experts():
    problem = ExpertsProblem(scheme=SCHEMES["nvfp4-w4a16"], experts=512, top_k=2, hidden=2048, intermediate=768)
    own = next(one for one in resolve(problem, describe("sm_120")).candidates if one.spec is SPECS["b12x-a16"])
    assert own.state in ("selected", "outranked")


#: Every kernel on a card, with a scheme and each way in which x reaches the library.
EVERY = [
    (100, "cutlass", "nvfp4-w4a4"),
    (100, "cute-dsl", "nvfp4-w4a4"),
    (100, "cute-dsl-a16", "nvfp4-w4a16"),
    (100, "trtllm", "nvfp4-w4a4"),
    (100, "trtllm", "mxfp4-w4a16"),
    (120, "b12x", "nvfp4-w4a4"),
    (120, "b12x", "mxfp4-w4a4"),
    (120, "b12x-a16", "nvfp4-w4a16"),
    (90, "cutile", "nvfp4-w4a16"),
]


@pytest.mark.parametrize(("capability", "kernel", "scheme"), EVERY)
def test_rows_at_any_address_are_taken(capability: int, kernel: str, scheme: str):
    x, routing = data.activations(5, SIZE, torch.bfloat16), data.routing(5, EXPERTS_COUNT, 2)
    shifted = torch.empty(5 * SIZE + 1, dtype=torch.bfloat16)[1:].view(5, SIZE)
    shifted.copy_(x)
    assert shifted.data_ptr() % 32
    with emulated(capability):
        own = packed(kernel, layer(scheme))
        assert torch.equal(run(kernel, own, shifted, *routing), run(kernel, own, x, *routing))


@pytest.mark.parametrize(("capability", "kernel", "scheme"), EVERY)
def test_a_rank_may_hold_fewer_experts_than_a_token_takes(capability: int, kernel: str, scheme: str):
    """4 experts here, the last of 16; tokens take 6, of which all, some or none are here."""
    x, top_k = data.activations(7, SIZE, torch.bfloat16), 6
    ids = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:top_k] for seed in range(7)])
    ids[0], ids[1] = torch.tensor([12, 13, 14, 15, 0, 1]), torch.arange(top_k)
    ids, weights = ids.to(torch.int32), torch.full((7, top_k), 1 / top_k)
    expert_map = torch.where(torch.arange(16) < 12, -1, torch.arange(16) - 12).to(torch.int32)
    own_weights = layer(scheme)
    with emulated(capability):
        own = packed(kernel, own_weights, top_k=top_k)
        experts = load_kernel(SPECS[kernel])
        assert isinstance(experts, ExpertsKernel)
        y = experts.apply(x, own, ids, weights, expert_map)
    rounding = oracle.rounding_of(SPECS[kernel], scheme)
    expected = oracle.experts(x, own_weights, ids, weights, activation="silu", rounding=rounding, expert_map=expert_map)
    fmt = SCHEMES[scheme].weights.name
    assert errors(y, expected).within(tolerance("experts", fmt, "bfloat16", quantizes=rounding is not None))
    assert not y[1].any()
