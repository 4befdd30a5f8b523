"""What `pytest -m xpu` makes its report with, on a machine without a card."""

import json
from pathlib import Path

import pytest
import torch

from halfbyte_xpu.testing import numbers
from xpu import quantizer
from xpu.card_report import Report, read_json, run_part


def test_the_file_is_complete_after_every_entry(tmp_path: Path):
    file = tmp_path / "report.json"
    report = Report(file, {"machine": "a card"})
    assert json.loads(file.read_text()) == {"machine": "a card"}
    report.record({"code": 0}, "kernels", "one")
    report.record({"refused": ["why"]}, "kernels", "two")
    report.record({"code": 1}, "kernels", "one")
    assert read_json(file) == {"machine": "a card", "kernels": {"one": {"code": 1}, "two": {"refused": ["why"]}}}


def test_a_part_leaves_its_exit_code_and_the_end_of_what_it_said(tmp_path: Path):
    entry = run_part(["-c", "print('a' * 5000); raise SystemExit('bad')"], tmp_path, limit_s=60)
    assert entry["code"] == 1
    assert len(entry["end"]) == 4000
    assert entry["end"].endswith("bad\n")


def test_a_part_out_of_time_leaves_that_and_what_it_said(tmp_path: Path):
    entry = run_part(["-c", "import time; print('here', flush=True); time.sleep(600)"], tmp_path, limit_s=2)
    assert entry == {"code": None, "timed out": "after 2 s", "end": "here\n"}


def test_a_part_that_wrote_nothing_has_no_result(tmp_path: Path):
    assert read_json(tmp_path / "none.json") == {}


def test_a_library_that_does_not_load_is_the_reason(tmp_path: Path, monkeypatch):
    def load(_):
        raise OSError("libze_loader.so.1: no such file")

    monkeypatch.setattr(quantizer, "load", load)
    monkeypatch.setattr("sys.argv", ["quantizer.py", str(tmp_path / "result.json")])
    quantizer.main()
    assert "libze_loader" in read_json(tmp_path / "result.json")["skipped"]


def test_the_comparison_finds_wrong_scales_and_wrong_codes(doubles, monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cpu")
    assert quantizer.compare(device) == {"scales that differ": 0, "codes that differ": 0, "first": []}
    right = numbers.codes
    with monkeypatch.context() as patched:
        patched.setattr(numbers, "codes", lambda ratio: right(ratio * 1.01))
        found = quantizer.compare(device)
        assert (found["scales that differ"], found["codes that differ"] > 0) == (0, True)
        assert found["first"]
    exponents = numbers.exponents
    monkeypatch.setattr(numbers, "exponents", lambda amax, epsilon: exponents(amax, epsilon) - 1)
    assert quantizer.compare(device)["scales that differ"] > 30000
