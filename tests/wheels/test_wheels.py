from __future__ import annotations

import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Environment

ROOT = Path(__file__).parents[2]
PLUGINS = {
    "plugins/cuda_blackwell": "halfbyte_cuda_blackwell",
    "plugins/cuda_marlin": "halfbyte_cuda_marlin",
    "plugins/xpu": "halfbyte_xpu",
}
PACKAGES = {"core": "halfbyte", **PLUGINS}


def version(project: str) -> str:
    described = tomllib.loads((ROOT / project / "pyproject.toml").read_text(encoding="utf-8"))
    return str(described["project"]["version"])


def test_every_plugin_of_the_repository_is_tested_here() -> None:
    assert {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("plugins/*/pyproject.toml")} == set(PLUGINS)


@pytest.mark.parametrize("project", PACKAGES)
def test_a_wheel_carries_its_package_its_types_and_the_licence_and_nothing_else(
    build_wheel: Callable[[str], Path], project: str
) -> None:
    package = PACKAGES[project]
    with zipfile.ZipFile(build_wheel(project)) as wheel:
        names = set(wheel.namelist())
        metadata = f"{package}-{version(project)}.dist-info"
        assert {Path(name).parts[0] for name in names} == {package, metadata}
        assert f"{package}/py.typed" in names
        assert wheel.read(f"{metadata}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        described = message_from_bytes(wheel.read(f"{metadata}/METADATA"))
        assert (described["License-Expression"], described["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    sources = {path.relative_to(ROOT / project / "src").as_posix() for path in (ROOT / project / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_wheels_work_together_outside_the_repository(
    build_wheel: Callable[[str], Path], environment: Environment
) -> None:
    environment.install(*(build_wheel(project) for project in PACKAGES))
    for package in PACKAGES.values():
        where = environment.python(f"import {package}; print({package}.__file__)").strip()
        assert Path(where).is_relative_to(environment.site_packages)
    assert version("core") in environment.halfbyte("--version")
    rows = environment.halfbyte_json("doctor")["plugins"]
    assert {row["name"] for row in rows if not row.get("error")} >= {"cuda-blackwell", "cuda-marlin", "xpu"}
