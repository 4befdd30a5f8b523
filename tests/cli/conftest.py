"""Run the command line in this process."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from halfbyte.cli import main

ROOT = Path(__file__).parent.parent.parent


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def halfbyte(monkeypatch):
    """Call `halfbyte ARGUMENTS` with these environment variables; anything but a clean exit is an error here."""

    def call(*arguments: str | Path, **environment: str) -> Answer:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture(scope="session")
def example() -> Path:
    """The checkpoint that the demo runs."""
    return ROOT / "examples" / "tiny-python-lm"


@pytest.fixture(scope="session")
def heldout() -> Path:
    """Text that the example's model has not seen."""
    return ROOT / "examples" / "heldout.txt"
