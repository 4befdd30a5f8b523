"""One global scale for gate and up: exact or not at all, and cheap; which experts share input scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from halfbyte.conformance import data
from halfbyte.errors import CheckpointError
from halfbyte.matrix import Matrix, times_power_of_two
from halfbyte.problems import INPUT_SCALES, InputScales
from halfbyte.schemes import MXFP4_W4A16, NVFP4_W4A4, NVFP4_W4A16
from halfbyte.weights import ExpertsWeights
from support.weights import known_experts

E, H, I = 5, 64, 96  # noqa: E741 - the sizes' usual names


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def effective(matrix: Matrix) -> Tensor:
    """Block scale times global scale in float64 [E, N, K/16]: all that folding may not change."""
    assert matrix.global_scale is not None
    return matrix.scales.double() * matrix.global_scale[:, None, None]


def scales_between(low: float, high: float, rows: int = I) -> Tensor:
    """E4M3 scales [E, rows, H/16] that need all three mantissa bits, from `low` to below 2 * `high`."""
    exponents = torch.randint(int(torch.tensor(low).log2()), int(torch.tensor(high).log2()) + 1, (E, rows, H // 16))
    return ((1 + torch.randint(8, exponents.shape) / 8) * torch.exp2(exponents)).to(torch.float8_e4m3fn)


def weights(ratios: list[float], gate: Tensor, up: Tensor) -> ExpertsWeights:
    """Experts whose gate has a global scale of `ratios` times up's."""
    known = known_experts(NVFP4_W4A16, E, H, I).weights
    assert known.gate is not None
    assert known.up.global_scale is not None
    scale = known.up.global_scale * torch.tensor(ratios, dtype=torch.float64)
    return replace(known, gate=replace(known.gate, scales=gate, global_scale=scale), up=replace(known.up, scales=up))


MIDDLE = (0.25, 4.0)


@pytest.mark.parametrize(
    ("ratios", "gate", "up"),
    [
        ([1, 2, 0.5, 1, 8], MIDDLE, MIDDLE),
        # Gate's scales may only grow, up's may only shrink: where gate's are the smallest normal numbers, and reverse.
        ([4, 4, 4, 4, 4], (2**-6, 2**-6), (2**-6, 2**-6)),
        ([0.25, 0.25, 4, 1, 0.25], (2**-6, 1.0), (2**-6, 1.0)),
        ([2, 2, 2, 2, 2], (64.0, 128.0), (64.0, 128.0)),
        # One expert can only be folded one way, and its neighbour only the other way.
        ([2**-12, 2**12, 1, 1, 1], (2**-6, 2**-6), (2**-6, 2**-6)),
    ],
)
def test_a_ratio_of_two_powers_is_folded_without_changing_any_number(
    ratios: list[float], gate: tuple[float, float], up: tuple[float, float]
) -> None:
    before = weights(ratios, scales_between(*gate), scales_between(*up))
    after = before.with_shared_global_scale()
    assert after is not None
    assert after.gate is not None
    assert before.gate is not None
    assert after.gate.global_scale is not None
    assert after.up.global_scale is not None
    assert torch.equal(after.gate.global_scale, after.up.global_scale)
    assert torch.equal(effective(after.gate), effective(before.gate))
    assert torch.equal(effective(after.up), effective(before.up))
    assert after.with_shared_global_scale() is after
    assert before.problem(torch.float32, top_k=1, activation="silu").shared_global_scale is True


@pytest.mark.parametrize("exponent", [10, 17, 18, 40, 200])
def test_a_power_of_two_that_overflows_one_and_rounds_the_other_is_refused(exponent: int) -> None:
    wide = scales_between(2**-6, 128.0)
    for sign in (1, -1):
        before = weights([1, 1, 1, 1, 2.0 ** (sign * exponent)], wide, wide)
        assert before.with_shared_global_scale() is None
        assert before.problem(torch.float32, top_k=1, activation="silu").shared_global_scale is False


def test_folding_leaves_the_original_as_it_was() -> None:
    before = weights([2, 1, 1, 1, 1], scales_between(*MIDDLE), scales_between(*MIDDLE))
    assert before.gate is not None
    kept = [effective(before.gate), effective(before.up)]
    before.with_shared_global_scale()
    assert torch.equal(effective(before.gate), kept[0])
    assert torch.equal(effective(before.up), kept[1])


@pytest.mark.parametrize("ratios", [[1.0] * E, [1.0, 1.0, 2.0, 1.0, 1.1]])
def test_equal_global_scales_and_other_ratios_are_answered_without_block_scales(
    ratios: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(ratios, scales_between(*MIDDLE), scales_between(*MIDDLE))
    monkeypatch.setattr("halfbyte.weights.times_power_of_two", None)
    monkeypatch.setattr(Tensor, "clone", None)
    expected = before if ratios == [1.0] * E else None
    assert before.with_shared_global_scale() is expected


def test_only_experts_whose_scales_differ_are_looked_at_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights([1, 2, 1, 1, 4], scales_between(*MIDDLE), scales_between(*MIDDLE))
    looked: list[int] = []

    def counted(scales: Tensor, exponent: int) -> Tensor | None:
        looked.append(exponent)
        return times_power_of_two(scales, exponent)

    monkeypatch.setattr("halfbyte.weights.times_power_of_two", counted)
    before.problem(torch.float32, top_k=1, activation="silu")
    before.with_shared_global_scale()
    assert looked == [-1, -2]


def test_different_input_scales_cannot_be_shared() -> None:
    known = known_experts(NVFP4_W4A4, E, H, I).weights
    assert known.gate is not None
    assert known.up.input_global_scale is not None
    gate = replace(known.up, input_global_scale=known.up.input_global_scale * 2)
    assert replace(known, gate=gate).with_shared_global_scale() is None


def test_weights_without_a_gate_or_without_global_scales_are_shared_as_they_are() -> None:
    for known in (known_experts(MXFP4_W4A16, E, H, I), known_experts(NVFP4_W4A16, E, H, I, gated=False)):
        assert known.weights.with_shared_global_scale() is known.weights


@pytest.mark.parametrize("order", ["gate-up", "up-gate", "interleaved"])
def test_gate_and_up_are_fused_in_the_order_that_is_asked_for(
    order: Literal["gate-up", "up-gate", "interleaved"],
) -> None:
    known = known_experts(NVFP4_W4A16, E, H, I).weights
    gate = known.gate
    assert gate is not None
    fused = known.fused_gate_up(order)
    parts = {"gate-up": (slice(0, I), slice(I, None)), "up-gate": (slice(I, None), slice(0, I))}
    gate_rows, up_rows = parts.get(order, (slice(0, None, 2), slice(1, None, 2)))
    assert torch.equal(fused.packed[:, gate_rows], gate.packed)
    assert torch.equal(fused.packed[:, up_rows], known.up.packed)
    assert torch.equal(fused.scales[:, gate_rows].view(torch.uint8), gate.scales.view(torch.uint8))
    assert torch.equal(fused.scales[:, up_rows].view(torch.uint8), known.up.scales.view(torch.uint8))


def test_a_matrix_that_moves_nowhere_is_not_checked_anew() -> None:
    matrix = known_experts(NVFP4_W4A16, E, H, I, bias=True).weights.up
    assert matrix.to("cpu") is matrix
    with pytest.raises(CheckpointError, match="never loaded"):
        matrix.to("meta")


@pytest.mark.parametrize("input_scales", INPUT_SCALES)
@pytest.mark.parametrize("gated", [True, False])
def test_experts_say_which_of_them_share_input_scales(input_scales: InputScales, gated: bool) -> None:
    made = data.experts_weights(NVFP4_W4A4, E, H, I, dtype=torch.float32, gated=gated, input_scales=input_scales)
    assert made.input_scales == input_scales
    problem = made.problem(torch.float32, top_k=1, activation="silu" if gated else "relu2")
    assert problem.input_scales == input_scales


def test_a_gate_with_another_input_scale_than_up_counts() -> None:
    made = data.experts_weights(NVFP4_W4A4, E, H, I, dtype=torch.float32, input_scales="one")
    assert made.gate is not None
    assert made.gate.input_global_scale is not None
    gate = replace(made.gate, input_global_scale=made.gate.input_global_scale * 2)
    assert replace(made, gate=gate).input_scales == "per-expert"


def test_experts_whose_activations_have_no_input_scales_share_none() -> None:
    assert known_experts(NVFP4_W4A16, E, H, I).weights.input_scales is None
    assert known_experts(MXFP4_W4A16, E, H, I).weights.input_scales is None
    calibrated = known_experts(NVFP4_W4A4, E, H, I).weights
    assert replace(calibrated, down=replace(calibrated.down, input_global_scale=None)).input_scales is None
