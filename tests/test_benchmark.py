from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from halfbyte.benchmark import DENSE, bench, measure, timing
from halfbyte.benchmark.timing import median_microseconds
from halfbyte.decisions import State
from halfbyte.errors import UsageError
from halfbyte.policies import Policy
from halfbyte.problems import ExpertsProblem, InputScales, LinearProblem
from halfbyte.refusals import Code
from halfbyte.schemes import MXFP4_W4A16, NVFP4_W4A4
from halfbyte.weights import ExpertsWeights

if TYPE_CHECKING:
    from torch import Tensor

LINEAR = LinearProblem(scheme=NVFP4_W4A4, n=48, k=64, bias=True)
EXPERTS = ExpertsProblem(scheme=MXFP4_W4A16, experts=4, top_k=2, hidden=64, intermediate=96, bias=True)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SECONDS", 0.0)


@pytest.mark.parametrize("problem", [LINEAR, EXPERTS], ids=str)
def test_every_eligible_kernel_is_compared_and_timed_for_every_m(problem: LinearProblem | ExpertsProblem) -> None:
    told: list[str] = []
    rows = bench(problem, [300, 1], device="cpu", progress=told.append)
    timed = [row for row in rows if row.m is not None]
    assert {(row.kernel, row.m) for row in timed} >= {
        (kernel, m) for kernel in (DENSE, "reference", "dequantized") for m in (1, 300)
    }
    assert [row.m for row in timed] == sorted((row.m for row in timed if row.m is not None), reverse=True)
    dense = {row.m: row.median_us for row in timed if row.kernel == DENSE}
    for row in timed:
        assert row.ok
        assert row.error is not None
        assert row.tolerance is not None
        assert 0 <= row.error <= row.tolerance
        base = dense[row.m]
        assert base is not None
        assert row.median_us is not None
        assert row.ratio == pytest.approx(base / row.median_us)
    assert told[0] == DENSE
    assert {"reference", "dequantized"} <= set(told)


@pytest.mark.parametrize(("known", "made"), [(None, "one"), ("one-for-x", "one-for-x"), ("per-expert", "per-expert")])
def test_weights_are_those_of_the_problem_and_such_as_every_kernel_takes_where_it_is_open(
    known: InputScales | None, made: InputScales
) -> None:
    problem = ExpertsProblem(
        scheme=NVFP4_W4A4, experts=4, top_k=2, hidden=64, intermediate=96, shared_global_scale=True, input_scales=known
    )
    weights = measure._Question.of(problem, torch.device("cpu")).weights
    assert isinstance(weights, ExpertsWeights)
    assert weights.input_scales == made


def test_only_the_experts_that_are_read_count_for_the_copies_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[float] = []

    def one(bytes_read: float, _device: torch.device) -> int:
        read.append(bytes_read)
        return 1

    monkeypatch.setattr(measure, "copies_needed", one)
    bench(replace(EXPERTS, top_k=1), [2, 1], device="cpu", policy=Policy(deny="dequantized"))
    bench(EXPERTS, [64], device="cpu", policy=Policy(deny="dequantized"))
    assert read[:2] == [count / 4 for count in read[2:]]


def test_a_wrong_kernel_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(self: object, x: Tensor, packed: object, bias: Tensor | None) -> Tensor:
        return x.new_zeros(x.shape[0], LINEAR.n)

    monkeypatch.setattr("halfbyte.reference.linear.Dequantized.apply", zeros)
    (row,) = [row for row in bench(LINEAR, [2], device="cpu") if row.kernel == "dequantized"]
    assert (row.ok, row.median_us, row.ratio) == (False, None, None)
    assert row.error is not None
    assert row.tolerance is not None
    assert row.error > row.tolerance


def test_a_kernel_that_raises_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(self: object, *arguments: object) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("halfbyte.reference.linear.Dequantized.apply", raises)
    rows = {row.kernel: row for row in bench(LINEAR, [2], device="cpu")}
    assert rows["dequantized"].failure == "RuntimeError: no such instruction"
    assert not rows["dequantized"].ok
    assert rows["reference"].ok


def test_a_kernel_that_must_not_run_is_kept_with_its_refusals() -> None:
    rows = bench(LINEAR, [1], device="cpu", policy=Policy(deny="reference"))
    (denied,) = [row for row in rows if row.kernel == "reference"]
    assert (denied.state, denied.m, denied.median_us) == (State.BLOCKED, None, None)
    assert [refusal.code for refusal in denied.refusals] == [Code.DENIED]
    assert [row.m is None for row in rows] == sorted(row.m is None for row in rows)


@pytest.mark.parametrize("ms", [[], [0], [4, -1]])
def test_numbers_of_rows_that_make_no_sense_are_a_usage_error(ms: list[int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        bench(LINEAR, ms)


def test_the_median_is_that_of_all_copies_in_turn() -> None:
    made: list[int] = []

    def call(copy: int) -> Tensor:
        made.append(copy)
        return torch.empty(0)

    assert median_microseconds([lambda: call(0), lambda: call(1)], torch.device("cpu")) > 0
    assert all(one != other for one, other in pairwise(made[1:]))
