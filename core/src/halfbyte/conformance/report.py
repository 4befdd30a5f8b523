"""The JSON report of a run: which kernel, of which plugin, on which machine, and the outcome of every check."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from halfbyte.conformance.environment import Environment
from halfbyte.plugins import Plugin
from halfbyte.specs import KernelSpec


@dataclass(slots=True, kw_only=True)
class Report:
    """What is known so far."""

    kernels: tuple[tuple[Plugin, KernelSpec], ...]
    environment: Environment | None = None
    #: Check to (outcome, detail).
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)

    def note(self, check: str, call: pytest.CallInfo[None]) -> None:
        """Note one phase of a check; the worst of its phases counts."""
        if call.excinfo is None:
            self.outcomes.setdefault(check, ("passed", ""))
            return
        outcome = "skipped" if call.excinfo.errisinstance(pytest.skip.Exception) else "failed"
        if self.outcomes.get(check, ("", ""))[0] != "failed":
            self.outcomes[check] = (outcome, str(call.excinfo.value))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        machine = None if self.environment is None else self.environment.machine
        return {
            "kernels": sorted({spec.id for _, spec in self.kernels}),
            "plugins": {plugin.name: f"{plugin.distribution} {plugin.version}" for plugin, _ in self.kernels},
            "halfbyte": version("halfbyte"),
            "torch": version("torch"),
            "machine": None if machine is None else machine.to_dict(),
            "device": None if self.environment is None else str(self.environment.device),
            "passed": all(outcome != "failed" for outcome, _ in self.outcomes.values()),
            "checks": [
                {"check": check, "outcome": outcome, "detail": detail}
                for check, (outcome, detail) in self.outcomes.items()
            ],
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
