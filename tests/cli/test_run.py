"""`halfbyte run` and `halfbyte perplexity` on the checkpoint of the demo."""

import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def prompt() -> str:
    return "class Node:\n    def __init__(self, "


def test_the_prompt_and_its_continuation_go_to_stdout_and_the_kernels_to_stderr(halfbyte, example, prompt: str):
    answer = halfbyte("run", example, "--prompt", prompt, "--max-new-tokens", "12")
    assert answer.code == 0
    assert answer.out.startswith(prompt)
    assert "self." in answer.out.removeprefix(prompt)
    assert answer.err.count("\n") == 1
    assert "42 layers" in answer.err


def test_greedy_text_is_the_same_every_time_and_for_both_forms_of_the_weights(halfbyte, example, prompt: str):
    call = ("run", example, "--prompt", prompt, "--max-new-tokens", "12", "--json", "--weights")
    packed, dequantized = halfbyte(*call, "packed"), halfbyte(*call, "dequantized")
    assert packed.data["text"] == dequantized.data["text"]
    assert packed.data["kernels"] == {"reference": 42}
    assert dequantized.data["kernels"] == {"dequantized": 42}


def test_sampling_is_repeatable_with_a_seed(halfbyte, example, prompt: str):
    call = ("run", example, "--prompt", prompt, "--max-new-tokens", "12", "--temperature", "1.5", "--seed")
    assert halfbyte(*call, "1").out == halfbyte(*call, "1").out
    assert halfbyte(*call, "1").out != halfbyte(*call, "2").out


def test_a_required_kernel_that_cannot_run_is_exit_code_1(halfbyte, example, prompt: str):
    answer = halfbyte("run", example, "--prompt", prompt, "--deny", "*")
    assert answer.code == 1
    assert "denied" in answer.err
    assert answer.out == ""


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--device", "cuda"), "no device 'cuda'"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--prompt", ""), "prompt"),
        (("--prompt", "\udcff"), "Unicode"),
        (("--temperature", "nan"), "temperature"),
        (("--seed", "99999999999999999999"), "--seed"),
    ],
)
def test_wrong_usage_is_exit_code_2(halfbyte, example, extra, message: str):
    answer = halfbyte("run", example, "--prompt", "x", *extra)
    assert answer.code == 2
    assert message in answer.err


def test_a_damaged_checkpoint_is_one_message_that_names_the_file(halfbyte, example, tmp_path):
    broken = shutil.copytree(example, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for command in (("explain", broken), ("run", broken, "--prompt", "x")):
        answer = halfbyte(*command)
        assert answer.code == 2
        assert "model.safetensors" in answer.err


def test_perplexity_as_json(halfbyte, example, heldout):
    answer = halfbyte(
        "perplexity",
        example,
        "--text",
        heldout,
        "--window",
        "128",
        "--max-windows",
        "4",
        "--dtype",
        "float32",
        "--json",
    )
    assert answer.code == 0
    assert set(answer.data) == {"loss", "perplexity", "windows", "tokens", "kernels"}
    assert (answer.data["windows"], answer.data["tokens"]) == (4, 4 * 127)
    assert 1.5 < answer.data["loss"] < 4


@pytest.fixture
def nan_model(example, tmp_path) -> Path:
    """The example with a norm that is NaN."""
    broken = Path(shutil.copytree(example, tmp_path / "nan"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, broken / "model.safetensors")
    return broken


def test_a_model_that_computes_nan_is_exit_code_1(halfbyte, nan_model, heldout):
    for command in (
        ("perplexity", nan_model, "--text", heldout, "--window", "64", "--max-windows", "1"),
        ("run", nan_model, "--prompt", "x"),
        ("run", nan_model, "--prompt", "x", "--temperature", "1"),
    ):
        answer = halfbyte(*command)
        assert answer.code == 1
        assert "NaN" in answer.err


def test_more_tokens_than_the_model_was_made_for_are_an_error_or_said(halfbyte, example, heldout):
    answer = halfbyte("perplexity", example, "--text", heldout, "--window", "2000")
    assert answer.code == 2
    assert "1024" in answer.err
    broken_off = halfbyte("run", example, "--prompt", "x" * 2050, "--max-new-tokens", "1")
    assert "1024" in broken_off.err


def test_what_is_wrong_with_a_checkpoint_is_said_as_explain_says_it(halfbyte, tmp_path):
    for folder in ("nvidia/Some-Model-FP4", tmp_path):
        explained, run = halfbyte("explain", folder), halfbyte("run", folder, "--prompt", "x")
        assert (explained.code, run.code) == (2, 2)
        assert explained.err == run.err


@pytest.mark.parametrize("tokenizer", ["{}", "[", '{"version": "1.0", "model": {"type": "none"}}'])
def test_a_damaged_tokenizer_is_one_message(halfbyte, example, tmp_path, tokenizer: str):
    broken = Path(shutil.copytree(example, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text(tokenizer)
    answer = halfbyte("run", broken, "--prompt", "x")
    assert answer.code == 2
    assert "tokenizer" in answer.err


def test_a_text_that_is_not_there_is_exit_code_2(halfbyte, example, tmp_path):
    answer = halfbyte("perplexity", example, "--text", tmp_path / "none.txt")
    assert answer.code == 2
    assert "none.txt" in answer.err
