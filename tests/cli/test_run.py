"""`halfbyte run` and `halfbyte perplexity` on the checkpoint of the demo."""

import math
import shutil

import pytest

from halfbyte.perplexity import Perplexity


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


def test_a_loss_that_is_no_number_is_null_in_json(halfbyte, example, heldout, monkeypatch):
    broken = Perplexity(loss=math.nan, perplexity=math.inf, windows=1, tokens=1)
    monkeypatch.setattr("halfbyte.perplexity.perplexity", lambda *_: broken)
    data = halfbyte("perplexity", example, "--text", heldout, "--json").data
    assert (data["loss"], data["perplexity"]) == (None, None)


def test_a_text_that_is_not_there_is_exit_code_2(halfbyte, example, tmp_path):
    answer = halfbyte("perplexity", example, "--text", tmp_path / "none.txt")
    assert answer.code == 2
    assert "none.txt" in answer.err
