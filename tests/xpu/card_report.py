"""What an Intel GPU showed: each part in a process of its own, each result in the file as soon as it is known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Report:
    """A JSON file that is complete after every entry, so that a crash or a hang loses one part."""

    def __init__(self, file: Path, known: dict[str, Any]) -> None:
        self._file, self._known = file, known
        self._write()

    def record(self, entry: dict[str, Any], *names: str) -> None:
        """Put an entry in the place that the names lead to."""
        *parents, last = names
        place = self._known
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = entry
        self._write()

    def _write(self) -> None:
        self._file.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")


def run_part(words: Sequence[str], folder: Path, limit_s: float) -> dict[str, Any]:
    """Run Python with these words in the folder; return its exit code (None: out of time) and the end of its output."""
    output = folder / "output.txt"
    entry: dict[str, Any] = {}
    with output.open("wb") as file:
        command = [sys.executable, *words]
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=folder, timeout=limit_s
            )
            entry["code"] = done.returncode
        except subprocess.TimeoutExpired:
            entry |= {"code": None, "timed out": f"after {limit_s:g} s"}
    return entry | {"end": output.read_text(encoding="utf-8", errors="replace")[-4000:]}


def read_json(file: Path) -> dict[str, Any]:
    """What a part has written; empty where it did not come so far."""
    if not file.exists():
        return {}
    written: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return written
