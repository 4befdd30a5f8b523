"""What happens to the standard streams: pipes that close, interrupts, terminals of every width."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli import output
from halfbyte.reports import Table

DOCTOR = [sys.executable, "-m", "halfbyte", "doctor"]


def run(command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)


def test_a_reader_that_has_read_enough_is_no_error():
    shown = run(f"set -o pipefail; {' '.join(DOCTOR)} | head -0")
    assert shown.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_message():
    shown = run(f"{' '.join(DOCTOR)} > /dev/full")
    assert shown.returncode == 1
    assert shown.stderr.count("\n") == 1


def test_a_closed_stdout_is_no_traceback():
    shown = run(f"{' '.join(DOCTOR)} >&-")
    assert "Traceback" not in shown.stderr


def test_output_that_the_encoding_cannot_say_is_escaped(example):
    explain = f"PYTHONIOENCODING=ascii {sys.executable} -m halfbyte explain {example}"
    assert run(explain).returncode == 0


def test_colour_that_the_environment_forces_stays_out_of_pipes():
    assert "\x1b" not in run(f"FORCE_COLOR=1 {' '.join(DOCTOR)}").stdout


def test_an_unknown_command_names_the_nearest(halfbyte):
    answer = halfbyte("docter")
    assert answer.code == 2
    assert "'doctor'" in answer.err


def test_ctrl_c_is_exit_code_130(halfbyte, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("halfbyte.cli.doctor.examine", interrupted)
    assert halfbyte("doctor").code == 130


WIDE = Table("t", ("kernel", "state", "why not"), [("a" * 30, "selected", "-"), ("b", "blocked", "word " * 30)])


@pytest.mark.parametrize("width", [50, 80, 200])
def test_on_a_terminal_no_name_is_broken(monkeypatch, capsys, width: int):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    output.print_tables([WIDE])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "a" * 30 in shown
    assert max(map(len, shown.split("\n"))) <= width
