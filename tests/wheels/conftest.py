"""Wheels of this repository's projects, and an environment outside it to install them into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, accepted: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a command without anything of the user's settings for halfbyte or of this process's import path."""
    dropped = ("HALFBYTE_", "PYTHON", "COV_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode not in accepted or "Traceback" in done.stderr:
        pytest.fail(f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment that sees this one's third-party packages, but not its editable halfbyte."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Environment:
        """Make the environment in `folder`."""
        venv.create(folder, symlinks=os.name != "nt")
        environment = cls(folder)
        # Modules are found in a folder named by a .pth file; the .pth files (editable installs) inside it are not read.
        (environment.site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        return environment

    def _path(self, name: str) -> Path:
        return Path(sysconfig.get_path(name, "venv", vars={"base": str(self.folder), "platbase": str(self.folder)}))

    @property
    def site_packages(self) -> Path:
        """Where this environment's own packages lie."""
        return self._path("purelib")

    @property
    def scripts(self) -> Path:
        """Where its commands lie."""
        return self._path("scripts")

    def install(self, *wheels: Path) -> None:
        """Install wheels, and nothing else."""
        pip = (sys.executable, "-m", "pip", "--python", self.scripts / "python")
        run(*pip, "install", "--no-deps", "--no-index", "--quiet", *wheels, cwd=self.folder)

    def python(self, code: str) -> str:
        """Return what a program prints."""
        return run(self.scripts / "python", "-W", "error", "-c", code, cwd=self.folder).stdout

    def halfbyte(self, *arguments: str) -> str:
        """Return what the command `halfbyte` prints; it must succeed."""
        return run(self.scripts / "halfbyte", *arguments, cwd=self.folder).stdout

    def halfbyte_json(self, *arguments: str) -> Any:
        """Return what the command `halfbyte` says with --json, where the answer may also be no (exit code 1)."""
        done = run(self.scripts / "halfbyte", *arguments, "--json", cwd=self.folder, accepted=(0, 1))
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def build_wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build the wheel of a project of this repository, named by its folder; each once a session."""
    built: dict[str, Path] = {}

    def build(project: str) -> Path:
        if project not in built:
            out = tmp_path_factory.mktemp("wheels")
            build_module = (sys.executable, "-m", "build")
            run(*build_module, "--wheel", "--no-isolation", "--outdir", out, ROOT / project, cwd=out)
            (built[project],) = out.glob("*.whl")
        return built[project]

    return build


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Return an empty environment outside the repository."""
    return Environment.create(tmp_path / "environment")
