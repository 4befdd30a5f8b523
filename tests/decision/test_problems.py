"""Problems: what they refuse, how they are padded, and what their weights weigh."""

from typing import Any

import pytest

from halfbyte.errors import UsageError
from halfbyte.formats import MXFP4, NVFP4
from halfbyte.problems import ExpertsProblem, LinearProblem, dequantized_bytes, packed_bytes
from halfbyte.schemes import MXFP4_W4A16, NVFP4_W4A4, Scheme


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 40}, "not a multiple of mxfp4's group of 32"),
        ({"n": 0}, "must be positive"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_a_linear_problem_refuses_what_cannot_be(fields: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        LinearProblem(**{"scheme": MXFP4_W4A16, "n": 8, "k": 64, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "silo"}, "did you mean 'silu'"),
        ({"hidden": 24}, "hidden=24"),
        ({"intermediate": 8}, "intermediate=8"),
        ({"experts": 0}, "positive"),
        ({"input_scales": "one-for-y"}, "did you mean 'one-for-x'"),
    ],
)
def test_an_experts_problem_refuses_what_cannot_be(fields: dict[str, Any], message: str):
    base = {"scheme": NVFP4_W4A4, "experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32}
    with pytest.raises(UsageError, match=message):
        ExpertsProblem(**{**base, **fields})


def test_bytes_are_those_of_every_matrix():
    linear = LinearProblem(scheme=NVFP4_W4A4, n=128, k=64, bias=True)
    assert packed_bytes(linear) == 128 * 32 + 128 * 4 + 4 + 128 * 2
    assert dequantized_bytes(linear) == (128 * 64 + 128) * 2
    experts = ExpertsProblem(scheme=MXFP4_W4A16, experts=2, top_k=1, hidden=64, intermediate=32, activation="relu2")
    assert dequantized_bytes(experts) == 2 * 2 * 64 * 32 * 2
    assert packed_bytes(experts) == 2 * 2 * 64 * 32 * 17 // 32


def test_padding_rounds_up_and_keeps_whole_groups():
    padded = LinearProblem(scheme=MXFP4_W4A16, n=10, k=64).padded(8, 72)
    assert (padded.n, padded.k) == (16, 288)
    experts = ExpertsProblem(scheme=NVFP4_W4A4, experts=2, top_k=1, hidden=80, intermediate=48).padded(32, 16)
    assert (experts.hidden, experts.intermediate) == (96, 64)


def test_a_scheme_is_one_format_with_or_without_activations():
    assert Scheme.parse("mxfp4-w4a4").weight_only == Scheme.parse("mxfp4-w4a16")
    assert Scheme(NVFP4, NVFP4).name == "nvfp4-w4a4"
    with pytest.raises(UsageError, match="no scheme"):
        Scheme(NVFP4, MXFP4)
    with pytest.raises(UsageError, match="did you mean 'nvfp4-w4a16'"):
        Scheme.parse("nvfp4-a16")
