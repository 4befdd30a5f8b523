"""`halfbyte explain`: one problem, a whole checkpoint, described machines, and what it says of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.machines import ARCHES
from halfbyte.plugins import installed_plugins
from halfbyte.schemes import SCHEMES

LINEAR = ("explain", "--op", "linear", "--scheme", "nvfp4-w4a16", "--shape", "4096x14336")
EXPERTS = ("explain", "--op", "experts", "--scheme", "mxfp4-w4a16", "--experts", "8", "--top-k", "2", "--hidden", "64")
CANDIDATE = {"kernel", "plugin", "state", "fidelity", "proof", "priority", "bytes", "refusals"}


def built_in(candidates):
    """Those of core: what plugins offer besides is theirs to test."""
    return [candidate for candidate in candidates if candidate["plugin"] == "halfbyte"]


def test_one_problem_as_json(halfbyte):
    answer = halfbyte(*LINEAR, "--machine", "cpu", "--bias", "--json")
    assert answer.code == 0
    assert set(answer.data) == {"problem", "machine", "selected", "decided_by", "candidates"}
    assert (answer.data["selected"], answer.data["decided_by"]) == ("dequantized", "priority")
    assert answer.data["problem"] == {
        "op": "linear",
        "scheme": "nvfp4-w4a16",
        "n": 4096,
        "k": 14336,
        "dtype": "bfloat16",
        "bias": True,
    }
    assert all(set(candidate) == CANDIDATE for candidate in answer.data["candidates"])
    assert answer.data["candidates"][0]["bytes"] == 4096 * 14336 * 2 + 4096 * 2


@pytest.mark.parametrize("machine", ARCHES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_described_machine_and_scheme_gets_an_answer(halfbyte, machine: str, scheme: str):
    arguments = ("--scheme", scheme, "--shape", "512x512", "--machine", machine, "--json")
    answer = halfbyte("explain", "--op", "linear", *arguments)
    assert answer.code == 0
    assert answer.data["machine"]["arch"] == machine


def test_experts_are_asked_with_their_own_sizes(halfbyte):
    answer = halfbyte(*EXPERTS, "--intermediate", "96", "--activation", "swigluoai", "--machine", "sm_90", "--json")
    assert answer.code == 0
    assert answer.data["problem"]["activation"] == "swigluoai"


def test_a_blocked_kernel_carries_the_refusal_that_blocks_it_and_nothing_left_is_exit_code_1(halfbyte):
    answer = halfbyte(*LINEAR, "--deny", "*", "--json")
    assert answer.code == 1
    assert answer.data["selected"] is None
    assert answer.data["decided_by"] == "argument deny"
    for candidate in built_in(answer.data["candidates"]):
        assert candidate["state"] == "blocked"
        assert [refusal["code"] for refusal in candidate["refusals"]] == ["denied"]
        assert all(set(refusal) == {"code", "detail", "hint"} for refusal in candidate["refusals"])


def test_the_environment_decides_and_is_named(halfbyte):
    answer = halfbyte(*LINEAR, "--json", HALFBYTE_PREFER="nvfp4-*=reference")
    assert (answer.data["selected"], answer.data["decided_by"]) == ("reference", "environment HALFBYTE_PREFER")


def test_a_checkpoint_as_json(halfbyte, example):
    answer = halfbyte("explain", example, "--json")
    assert answer.code == 0
    data = answer.data
    assert set(data) == {"checkpoint", "machine", "groups", "unquantized", "bytes", "fits", "notes"}
    layers = [name for group in data["groups"] for name in group["layers"]]
    assert len(layers) == len(set(layers)) == 6 * 7
    assert "lm_head.weight" in data["unquantized"]
    for group in data["groups"]:
        assert set(group) == {"layers", "problem", "selected", "decided_by", "candidates", "bytes"}
        selected = next(c for c in group["candidates"] if c["state"] == "selected")
        assert group["bytes"] == selected["bytes"] * len(group["layers"])
    assert data["bytes"] > sum(group["bytes"] for group in data["groups"])


def test_off_a_terminal_every_layer_and_path_is_a_word_of_its_own(halfbyte, example):
    answer = halfbyte("explain", example)
    words = answer.out.split()
    assert "model.layers.5.self_attn.q_proj" in words
    assert str(example) in words
    assert "\x1b" not in answer.out


def test_a_described_machine_counts_what_is_installed_only_when_asked(halfbyte, tmp_path):
    file = tmp_path / "card.toml"
    file.write_text('arch = "sm_120"\nmemory = 1000\n')
    assert halfbyte(*LINEAR, "--machine", file, "--json").code == 1
    assert halfbyte(*LINEAR, "--machine", "sm_120", "--installed", "--json").data["machine"]["packages"] is not None
    assert halfbyte(*LINEAR, "--machine", "sm_120", "--json").data["machine"]["packages"] is None


def test_a_model_that_is_too_large_dequantized_is_kept_packed(halfbyte, example, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text('arch = "cpu"\nmemory = 10_000_000\n')
    groups = halfbyte("explain", example, "--machine", file, "--json").data["groups"]
    assert {group["selected"] for group in groups} == {"reference"}
    codes = {r["code"] for group in groups for c in built_in(group["candidates"]) for r in c["refusals"]}
    assert codes == {"weights"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain",), "--op"),
        (("explain", "--op", "linear"), "--scheme, --shape"),
        (EXPERTS, "--intermediate"),
        ((*LINEAR[:-1], "4096"), "NxK"),
        ((*LINEAR[:-1], "64x40"), "group of 16"),
        ((*LINEAR, "--machine", "sm_91"), "did you mean 'sm_90'"),
        ((*LINEAR, "--require", "dequantised"), "did you mean 'dequantized'"),
        ((*LINEAR, "--require", "nvfp5=reference"), "nvfp"),
        (("explain", "no/such/folder"), "no/such/folder"),
        (("explain", ".", "--op", "linear"), "not both"),
        (("explain", ".", "--shape", "1x1"), "--shape"),
        (("explain", ".", "--installed"), "--machine"),
        ((*EXPERTS, "--intermediate", "64", "--top-k", "9"), "more than"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_message(halfbyte, arguments, message: str):
    answer = halfbyte(*arguments)
    assert answer.code == 2
    assert message in answer.err
    assert answer.out == ""


def test_an_unknown_environment_variable_is_an_error_with_the_nearest_match(halfbyte):
    answer = halfbyte(*LINEAR, HALFBYTE_REQIRE="reference")
    assert answer.code == 2
    assert "HALFBYTE_REQUIRE" in answer.err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("HALFBYTE_DISABLE_PLUGINS", "marlin", "cuda-marlin"), ("HALFBYTE_STRICT", "yes", "0 or 1")],
)
def test_a_value_that_names_nothing_is_an_error(halfbyte, name: str, value: str, message: str):
    installed_plugins.cache_clear()
    answer = halfbyte(*LINEAR, **{name: value})
    installed_plugins.cache_clear()
    assert answer.code == 2
    assert message in answer.err


def test_debug_adds_the_traceback_and_keeps_the_exit_code(halfbyte):
    answer = halfbyte("explain", "no/such/folder", "--debug")
    assert answer.code == 2
    assert "Traceback" in answer.err


def test_a_checkpoint_that_does_not_fit_is_exit_code_1(halfbyte, example, tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text('arch = "cpu"\nmemory = 3_000_000\n')
    answer = halfbyte("explain", example, "--machine", file, "--json")
    assert (answer.code, answer.data["fits"]) == (1, False)
    assert "does not fit" in halfbyte("explain", example, "--machine", file).out


@pytest.mark.parametrize("arguments", [["doctor", "--json"], [*LINEAR, "--json"], ["explain", "CHECKPOINT", "--json"]])
def test_no_torch_is_imported_to_plan_or_to_look_around(example: Path, arguments: list[str]):
    code = (
        "import sys, atexit; from halfbyte.cli import main\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'triton', 'flashinfer'}\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    arguments = [str(example) if argument == "CHECKPOINT" else argument for argument in arguments]
    result = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    assert json.loads(result.stdout)
