from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte.generation import stream
from halfbyte.models import load_model, load_tokenizer
from support.dense import dense_model, weight_only

EXAMPLE = Path(__file__).parents[1] / "examples/tiny-python-lm"
PROMPT = "def read_config(path):\n    with open("


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(EXAMPLE)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dense_model(EXAMPLE, tmp_path_factory.mktemp("dense"), "NVFP4")


def generated(model: Any, tokenizer: Any, tokens: int) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_greedy_text_is_that_of_transformers_generate(dense: Any, tokenizer: Any) -> None:
    pieces = list(stream(dense, tokenizer, PROMPT, 60))
    assert "".join(pieces) == generated(dense, tokenizer, 60)
    assert len(pieces) > 30


def test_greedy_text_of_fp4_layers_is_that_of_dense_ones(dense: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = load_model(weight_only(EXAMPLE, tmp_path / "weight-only"), device="cpu", dtype="float32")
    assert "".join(stream(model, tokenizer, PROMPT, 60)) == generated(dense, tokenizer, 60)


def test_a_seed_makes_sampling_reproducible(dense: Any, tokenizer: Any) -> None:
    texts = ["".join(stream(dense, tokenizer, PROMPT, 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generation_stops_at_an_end_token_without_showing_it(
    dense: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = list(stream(dense, tokenizer, PROMPT, 10))
    end = tokenizer(pieces[4], add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(dense.generation_config, "eos_token_id", [0, *end])
    assert pieces[:4] == list(stream(dense, tokenizer, PROMPT, 10))[:4]
    assert len(list(stream(dense, tokenizer, PROMPT, 10))) == pieces.index(pieces[4])


class Scripted:
    """A model that says the tokens of a script one after the other."""

    device = torch.device("cpu")

    def __init__(self, script: list[int], vocabulary: int) -> None:
        self._script: Iterator[int] = iter(script)
        self._vocabulary = vocabulary
        self.generation_config = type("Config", (), {"eos_token_id": None})()

    def __call__(self, **_: Any) -> Any:
        logits = torch.zeros(1, 1, self._vocabulary)
        logits[0, 0, next(self._script)] = 1
        return type("Output", (), {"logits": logits, "past_key_values": None})()


@pytest.mark.parametrize("text", ["naïve", "日本語 🙂 text", " ü", "a\N{REPLACEMENT CHARACTER}b", "ends in 🙂"])
def test_pieces_are_whole_characters_and_add_up(tokenizer: Any, text: str) -> None:
    script = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(script) > 1
    pieces = list(stream(Scripted(script, len(tokenizer)), tokenizer, "x = ", len(script)))
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


class Words:
    """A tokenizer that, as those of Llama 2, writes a space before every token but the first."""

    words = ("once", "upon", "a", "time")

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(self.words[token] for token in ids)


def test_the_space_before_the_first_new_token_is_kept() -> None:
    assert list(stream(Scripted([2, 3], 4), Words(), "once upon", 2)) == [" a", " time"]


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer: Any) -> None:
    script = tokenizer("ok 🙂", add_special_tokens=False)["input_ids"][:-1]
    pieces = list(stream(Scripted(script, len(tokenizer)), tokenizer, "x", len(script)))
    assert "".join(pieces) == tokenizer.decode(script)
    assert pieces[-1].endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("prompt", "tokens", "temperature", "message"),
    [("", 1, 0.0, "no tokens"), ("x", 0, 0.0, "max_new_tokens is 0"), ("x", 1, -1.0, "temperature is -1")],
)
def test_bad_questions_are_usage_errors(
    tokenizer: Any, prompt: str, tokens: int, temperature: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        stream(Scripted([], 8), tokenizer, prompt, tokens, temperature)
