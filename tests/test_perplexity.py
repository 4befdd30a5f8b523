from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.perplexity import perplexity


class Numbers:
    """A tokenizer of texts such as "3 1 4"."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


class NextIsOneMore:
    """A model of ten tokens that is `sure` of the token after each, in bfloat16."""

    device = torch.device("cpu")

    def __init__(self, sure: float) -> None:
        self.sure = sure
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        self.seen += input_ids.tolist()
        logits = torch.zeros(*input_ids.shape, 10, dtype=torch.bfloat16)
        logits.scatter_(-1, (input_ids[..., None] + 1) % 10, self.sure)
        return SimpleNamespace(logits=logits)


def loss_of(sure: float, *, right: bool) -> float:
    return math.log(math.exp(sure) + 9) - (sure if right else 0)


def test_windows_do_not_overlap_and_the_rest_is_dropped() -> None:
    model = NextIsOneMore(2.0)
    result = perplexity(model, Numbers(), "0 1 2 3 4 5 6 7 8 9 0", window=4)
    assert model.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (result.windows, result.tokens) == (2, 6)
    assert result.loss == pytest.approx(loss_of(2.0, right=True), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_every_prediction_counts_the_same() -> None:
    result = perplexity(NextIsOneMore(2.0), Numbers(), "0 1 2 4 5 6 7 9", window=4)
    expected = (4 * loss_of(2.0, right=True) + 2 * loss_of(2.0, right=False)) / 6
    assert result.loss == pytest.approx(expected, rel=1e-6)


def test_max_windows_limits_the_text_and_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    result = perplexity(
        NextIsOneMore(1.0), Numbers(), "1 2 3 4 5 6", window=2, max_windows=2, progress=lambda *step: seen.append(step)
    )
    assert result.windows == 2
    assert seen == [(1, 2), (2, 2)]


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert perplexity(NextIsOneMore(2000.0), Numbers(), "1 1", window=2).perplexity == math.inf


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("1 2 3", {"window": 4}, "the text has 3 tokens; one window needs 4"),
        ("1 2 3", {"window": 1}, "window is 1"),
        ("1 2 3", {"window": 2, "max_windows": 0}, "max_windows is 0"),
    ],
)
def test_bad_questions_are_usage_errors(text: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        perplexity(NextIsOneMore(1.0), Numbers(), text, **arguments)
