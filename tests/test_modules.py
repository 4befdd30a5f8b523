"""FP4Linear and FP4Experts: what core does for every kernel, held against float64 on compressed-tensors' numbers."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from halfbyte.decisions import decide
from halfbyte.errors import CheckpointError, NoKernelError, UsageError
from halfbyte.machines import describe
from halfbyte.modules import FP4Experts, FP4Linear
from halfbyte.policies import Policy
from halfbyte.schemes import MXFP4_W4A16, NVFP4_W4A4, NVFP4_W4A16, SCHEMES, Scheme
from support.kernels import chosen, picky
from support.weights import (
    KnownExperts,
    expected_experts,
    expected_linear,
    known_experts,
    known_linear,
    routing,
)

E, H, I, K = 4, 64, 32, 2  # noqa: E741 - the sizes' usual names


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def agree(y: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[y.dtype]
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()


def linear(scheme: Scheme = NVFP4_W4A16, rows: tuple[int, ...] = (40,), k: int = 64, **options: Any) -> Any:
    """A module and what is known of its weights; `spec` chooses a test's kernel, `bias` gives it one."""
    weights, known = known_linear(scheme, rows, k, bias=options.pop("bias", False))
    spec, dtype = options.pop("spec", None), options.pop("dtype", torch.float32)
    if spec is not None:
        options["resolution"] = chosen(spec, weights.problem(dtype))
    return FP4Linear(weights, dtype=dtype, **options), known


def experts(scheme: Scheme = NVFP4_W4A16, **options: Any) -> tuple[FP4Experts, KnownExperts]:
    known = known_experts(scheme, E, H, I, bias=options.pop("bias", False))
    options = {"dtype": torch.float32, "top_k": K, "activation": "silu", **options}
    return FP4Experts(known.weights, **options), known


REFERENCE = Policy(require="reference")
SPECS = pytest.mark.parametrize(
    "options",
    [
        {"policy": REFERENCE},
        {"policy": Policy(require="dequantized")},
        {"spec": picky("linear")},
        {"spec": picky("linear", target="support.kernels:FusingLinear", fuses_bias=True)},
    ],
    ids=["reference", "dequantized", "padding", "padding-fusing"],
)


@SPECS
@pytest.mark.parametrize("rows", [(40,), (96,), (16, 40, 8)], ids=["ragged", "aligned", "parts"])
@pytest.mark.parametrize("k", [64, 96])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_linear_is_exact_whatever_the_kernel_asks_of_core(
    options: dict[str, Any], rows: tuple[int, ...], k: int, bias: bool
) -> None:
    module, known = linear(rows=rows, k=k, bias=bias, **options)
    x = torch.randn(7, k)
    agree(module(x), expected_linear(known, NVFP4_W4A16, x))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_parts_with_different_global_scales_keep_their_own_in_every_scheme(scheme: Scheme) -> None:
    module, known = linear(scheme, (16, 40, 8), bias=True, policy=REFERENCE)
    x = torch.randn(7, 64)
    agree(module(x), expected_linear(known, scheme, x))


@SPECS
def test_inputs_may_have_any_leading_dimensions_and_strides(options: dict[str, Any]) -> None:
    module, known = linear(bias=True, **options)
    rows = torch.randn(12, 64)
    expected = expected_linear(known, NVFP4_W4A16, rows)
    agree(module(rows.reshape(2, 3, 2, 64)), expected.reshape(2, 3, 2, 40))
    agree(module(rows[0]), expected[0])
    agree(module(rows.t().contiguous().t()), expected)
    agree(module(torch.cat((rows, rows), 1)[:, 64:]), expected)
    agree(module(rows.reshape(3, 4, 64).transpose(0, 1)), expected.reshape(3, 4, 40).transpose(0, 1))
    agree(module(rows[:1].expand(5, 64)), expected[:1].expand(5, 40))


@SPECS
def test_zero_rows_give_zero_rows(options: dict[str, Any]) -> None:
    module, _ = linear(bias=True, **options)
    assert module(torch.randn(0, 64)).shape == (0, 40)
    assert module(torch.randn(2, 0, 3, 64)).shape == (2, 0, 3, 40)


def test_inputs_and_bias_are_not_changed_and_the_result_is_new_memory() -> None:
    weights, _ = known_linear(NVFP4_W4A16, (64,), 64, bias=True)
    module = FP4Linear(weights, dtype=torch.float32)
    x, bias = torch.randn(3, 64), weights.matrix.bias
    assert bias is not None
    before = x.clone(), bias.clone()
    y = module(x)
    y.zero_()
    module.load_state_dict({**module.state_dict(), "bias": torch.zeros(64)})
    assert torch.equal(x, before[0])
    assert torch.equal(bias, before[1])
    assert y.data_ptr() != x.data_ptr()


def test_sizes_kernel_and_scheme_are_shown() -> None:
    module, _ = linear(policy=REFERENCE)
    assert (module.in_features, module.out_features, module.bias) == (64, 40, None)
    shown = ("in_features=64", "out_features=40", "kernel=reference", "scheme=nvfp4-w4a16", "float32")
    assert all(text in repr(module) for text in shown)
    assert module.problem.n == 40
    assert module.resolution.chosen().spec.id == "reference"
    assert "experts=4, top_k=2, hidden=64, intermediate=32, activation=silu" in repr(experts()[0])


@pytest.mark.parametrize("spec", [None, picky("experts")], ids=["default", "padding"])
@pytest.mark.parametrize("scheme", [NVFP4_W4A16, MXFP4_W4A16], ids=str)
def test_experts_take_any_integer_ids_any_float_weights_and_any_shape(spec: Any, scheme: Scheme) -> None:
    known = known_experts(scheme, E, H, I)
    known.gate, known.weights = known.up, replace(known.weights, gate=known.up.matrix)
    problem = known.weights.problem(torch.float32, top_k=K, activation="silu")
    resolution = None if spec is None else chosen(spec, problem)
    module = FP4Experts(known.weights, top_k=K, activation="silu", dtype=torch.float32, resolution=resolution)
    x, (ids, weights) = torch.randn(6, H), routing(6, E, K)
    weights = weights.bfloat16().float()
    expected = expected_experts(known, x, ids, weights, "silu")
    agree(module(x, ids, weights), expected)
    agree(module(x, ids.int(), weights.double()), expected)
    shaped = module(x.reshape(2, 3, H), ids.short().reshape(2, 3, K), weights.bfloat16().reshape(2, 3, K))
    agree(shaped, expected.reshape(2, 3, H))
    agree(module(x.t().contiguous().t(), ids.t().contiguous().t(), weights), expected)
    assert module(x[:0], ids[:0], weights[:0]).shape == (0, H)


def test_experts_of_another_rank_add_nothing() -> None:
    module, known = experts()
    local = [-1, 3, 0, -1, 2, 1]
    x, (ids, weights) = torch.randn(6, H), routing(6, len(local), K)
    agree(module(x, ids, weights, torch.tensor(local)), expected_experts(known, x, ids, weights, "silu", local))


def test_a_kernel_with_one_scale_for_gate_and_up_is_refused_where_that_is_not_exact() -> None:
    known = known_experts(NVFP4_W4A16, E, H, I)
    unknown = known.weights.problem(torch.float32, top_k=K, activation="silu")
    resolution = chosen(picky("experts"), replace(unknown, shared_global_scale=None))
    with pytest.raises(UsageError, match=r"experts\.up: kernel 'picky' takes one global scale for gate and up"):
        FP4Experts(known.weights, top_k=K, activation="silu", dtype=torch.float32, resolution=resolution)


def test_a_kernel_with_one_input_scale_is_refused_where_the_experts_have_their_own() -> None:
    known = known_experts(NVFP4_W4A4, E, H, I, gated=False)
    unknown = known.weights.problem(torch.float32, top_k=K, activation="relu2").without_facts()
    with pytest.raises(UsageError, match=r"experts\.up: kernel 'picky' takes one input scale for gate and up of all"):
        FP4Experts(
            known.weights,
            top_k=K,
            activation="relu2",
            dtype=torch.float32,
            resolution=chosen(picky("experts", input_scales="one"), unknown),
        )


@pytest.mark.parametrize(("activation", "gated"), [("relu2", True), ("silu", False)])
def test_an_activation_that_does_not_fit_the_projections_is_an_error(activation: str, gated: bool) -> None:
    weights = known_experts(NVFP4_W4A16, E, H, I, gated=gated).weights
    with pytest.raises(UsageError, match=f"the activation '{activation}'"):
        FP4Experts(weights, top_k=K, activation=activation)


def test_projections_that_do_not_fit_each_other_name_the_one_that_is_wrong() -> None:
    weights = known_experts(NVFP4_W4A16, E, H, I).weights
    with pytest.raises(CheckpointError, match=r"experts\.down: nvfp4 weights \[4, 64, 32\], expected .*\[4, 64, 64\]"):
        replace(weights, gate=None, up=known_experts(NVFP4_W4A16, E, H, 64).up.matrix)
    biased = known_experts(NVFP4_W4A16, E, H, I, bias=True).weights
    with pytest.raises(CheckpointError, match=r"experts\.down: of the projections"):
        replace(biased, down=weights.down)
    with pytest.raises(CheckpointError, match=r"nvfp4 weights .* expected mxfp4"):
        replace(weights, scheme=MXFP4_W4A16)


def _filled(module: nn.Module, other: nn.Module, through: str) -> None:
    state = other.state_dict()
    if through == "safetensors":
        state = load(save(state))
    elif through == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    module.load_state_dict(state, assign=through == "assign")


@pytest.mark.parametrize("through", ["copy", "assign", "safetensors", "torch.save"])
@pytest.mark.parametrize("kernel", ["reference", "dequantized"])
def test_state_round_trips(through: str, kernel: str) -> None:
    policy = Policy(require=kernel)
    (first, _), (second, _) = (linear(NVFP4_W4A4, bias=True, policy=policy) for _ in range(2))
    x = torch.randn(3, 64)
    assert not torch.equal(first(x), second(x))
    _filled(first, second, through)
    assert torch.equal(first(x), second(x))
    (third, _), (fourth, _) = (experts(bias=True, policy=policy) for _ in range(2))
    x, (ids, weights) = torch.randn(3, H), routing(3, E, K)
    _filled(third, fourth, through)
    assert torch.equal(third(x, ids, weights), fourth(x, ids, weights))


def test_a_state_of_another_kernel_or_problem_is_an_error_that_names_both_and_changes_nothing() -> None:
    module, _ = linear(policy=REFERENCE)
    x = torch.randn(3, 64)
    before = module(x)
    with pytest.raises(UsageError, match=r"packed for kernel 'dequantized' .* runs kernel 'reference'"):
        module.load_state_dict(linear(policy=Policy(require="dequantized"))[0].state_dict())
    with pytest.raises(UsageError, match=r"packed for .*n=24.*; this module runs .*n=40"):
        module.load_state_dict(linear(rows=(24,), policy=REFERENCE)[0].state_dict())
    assert torch.equal(module(x), before)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("meta"),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to_empty(device="meta"),
        lambda m: nn.Sequential(m).half(),
    ],
)
@pytest.mark.parametrize("make", [lambda: linear(MXFP4_W4A16, policy=REFERENCE)[0], lambda: experts()[0]])
def test_another_device_or_dtype_is_an_error_that_says_to_load_there(move: Any, make: Any) -> None:
    with pytest.raises(UsageError, match=r"for torch\.float32 on cpu and cannot be converted .* load it there: give"):
        move(make())


def test_the_same_device_and_dtype_pass_and_no_packed_tensor_is_converted() -> None:
    module, _ = linear(NVFP4_W4A4, dtype=torch.bfloat16, policy=REFERENCE)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    before = module(x)
    for moved in (module.to("cpu"), module.bfloat16(), module.to(torch.bfloat16), module.cpu(), module.share_memory()):
        assert moved is module
    assert torch.equal(module(x), before)
    assert next(iter(module.parts[0].buffers())).is_shared()


def test_copies_are_independent() -> None:
    module, _ = linear(bias=True, policy=REFERENCE)
    other = copy.deepcopy(module)
    x = torch.randn(3, 64)
    before = module(x)
    for buffer in other.buffers():
        buffer.zero_()
    assert torch.equal(module(x), before)
    assert not other(x).any()
    assert other.resolution is module.resolution


def test_pickling_is_an_error_that_names_the_state_dict() -> None:
    with pytest.raises(UsageError, match=r"state_dict\(\)"):
        pickle.dumps(linear()[0])


def test_inputs_that_require_gradients_are_refused_only_where_gradients_are_recorded() -> None:
    module, _ = linear()
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(UsageError, match="inference only"):
        module(x)
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        assert module(x).shape == (3, 40)
    moe, _ = experts()
    ids, weights = routing(3, E, K)
    with pytest.raises(UsageError, match="inference only"):
        moe(torch.randn(3, H), ids, weights.requires_grad_())


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.zeros(3, 32), r"\[3, 32\]; expected \[\.\.\., 64\]"),
        (torch.zeros(()), r"\[\]; expected \[\.\.\., 64\]"),
        (torch.zeros(3, 64, dtype=torch.bfloat16), r"bfloat16 \[3, 64\] on cpu; .* takes float32 \[M, 64\]"),
        (torch.zeros(3, 64, device="meta"), r"on meta; .* on cpu.*move it"),
    ],
)
def test_a_wrong_input_is_an_error_that_says_what_was_expected(x: Tensor, found: str) -> None:
    with pytest.raises(UsageError, match=found):
        linear()[0](x)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
def test_an_expert_number_out_of_range_is_an_error_on_a_cpu(traced: bool) -> None:
    module, _ = experts()
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if traced else module
    x, weights = torch.randn(1, H), torch.ones(1, K)
    for ids, wrong in (([[0, E]], E), ([[-1, 0]], -1)):
        with pytest.raises(UsageError, match=f"topk_ids has expert {wrong}; expected 0 to 3"):
            run(x, torch.tensor(ids), weights)
    with pytest.raises(UsageError, match="expert_map has expert 4; expected -1 to 3"):
        run(x, torch.zeros(1, K, dtype=torch.long), weights, torch.tensor([4]))


def test_expert_numbers_must_be_integers() -> None:
    with pytest.raises(UsageError, match=r"topk_ids is torch\.float32 \[1, 2\]; expected integers"):
        experts()[0](torch.randn(1, H), torch.zeros(1, K), torch.ones(1, K))


def test_a_resolution_of_another_problem_or_machine_is_an_error() -> None:
    weights, _ = known_linear(NVFP4_W4A16, (40,), 64)
    problem = weights.problem(torch.float32)
    with pytest.raises(UsageError, match=r"float32.* the weights pose .*bfloat16"):
        FP4Linear(weights, dtype=torch.bfloat16, resolution=chosen(picky("linear"), problem))
    elsewhere = decide(problem, describe("sm_100"), [("test", picky("linear"))])
    with pytest.raises(UsageError, match="for sm_100; the weights go to cpu"):
        FP4Linear(weights, dtype=torch.float32, resolution=elsewhere)
    with pytest.raises(NoKernelError):
        FP4Linear(weights, dtype=torch.float32, resolution=chosen(picky("linear", devices=("cuda",)), problem))


def _compiled(module: nn.Module, backend: str) -> Any:
    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, backend=backend)


@SPECS
def test_linear_compiles_to_the_same_numbers(options: dict[str, Any]) -> None:
    module, _ = linear(rows=(16, 40), bias=True, **options)
    compiled = _compiled(module, "aot_eager")
    for rows in (5, 1, 0, 3):
        x = torch.randn(2, rows, 64)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def test_experts_compile_to_the_same_numbers() -> None:
    module, _ = experts(NVFP4_W4A4, bias=True)
    compiled = _compiled(module, "aot_eager")
    for tokens in (5, 1, 0, 3):
        x, (ids, weights) = torch.randn(tokens, H), routing(tokens, E, K) if tokens else (torch.zeros(0, K).int(),) * 2
        torch.testing.assert_close(compiled(x, ids, weights), module(x, ids, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own imports
def test_inductor_compiles_layers_and_what_surrounds_them() -> None:
    (first, _), (second, _) = linear(rows=(16, 48), bias=True, spec=picky("linear")), experts()

    class Block(nn.Module):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            y: Tensor = x + second(torch.relu(first(x)), ids, weights)
            return y

    x, (ids, weights) = torch.randn(5, H), routing(5, E, K)
    compiled = _compiled(Block(), "inductor")
    torch.testing.assert_close(compiled(x, ids, weights), Block()(x, ids, weights), rtol=1e-5, atol=1e-5)


def test_a_loaded_state_is_what_a_compiled_module_runs() -> None:
    (first, _), (second, _) = linear(policy=REFERENCE), linear(policy=REFERENCE)
    compiled, x = _compiled(first, "aot_eager"), torch.randn(3, 64)
    compiled(x)
    for assign in (False, True):
        second, _ = linear(policy=REFERENCE)
        first.load_state_dict(second.state_dict(), assign=assign)
        assert torch.equal(compiled(x), second(x))


def test_export_keeps_the_operator() -> None:
    module, _ = linear(bias=True)
    x = torch.randn(3, 64)
    exported = torch.export.export(module, (x,))
    assert any(node.target is torch.ops.halfbyte.linear.default for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), module(x))
