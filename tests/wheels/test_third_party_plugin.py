"""The example of an outsider's plugin, from its wheel, in an environment of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Environment

PROBLEM = ("--op", "linear", "--scheme", "nvfp4-w4a16", "--shape", "512x1024")

FORWARD = """
import torch
from halfbyte.conformance import data
from halfbyte.modules import FP4Linear
from halfbyte.schemes import NVFP4_W4A16
module = FP4Linear(data.linear_weights(NVFP4_W4A16, 100, 144, dtype=torch.bfloat16), device="cpu")
print(module.resolution.selected.spec.id, tuple(module(torch.ones(3, 144, dtype=torch.bfloat16)).shape))
"""

KIT = """
import sys, pytest
sys.exit(pytest.main([
    "-q", "-p", "no:cacheprovider", "-p", "halfbyte.conformance", "--pyargs", "halfbyte.conformance", "--device", "cpu",
    "--kernel", "outsider.lut", "-k", "declaration or float32 and (rows or trained or compiles)",
]))
"""


@pytest.fixture
def outsider(build_wheel: Callable[[str], Path], environment: Environment) -> Environment:
    environment.install(build_wheel("core"), build_wheel("examples/third_party_plugin"))
    return environment


def test_an_outsiders_wheel_is_found_and_its_kernel_selected(outsider: Environment) -> None:
    explained = outsider.halfbyte_json("explain", *PROBLEM, "--machine", "cpu")
    assert (explained["selected"], explained["decided_by"]) == ("outsider.lut", "priority")
    rows = {row["name"]: row for row in outsider.halfbyte_json("doctor")["plugins"]}
    assert (rows["outsider-fp4"]["distribution"], rows["outsider-fp4"]["error"]) == ("outsider-fp4", "")
    assert outsider.python(FORWARD).split(" ", 1) == ["outsider.lut", "(3, 100)\n"]


def test_an_outsiders_kernel_passes_the_kit_from_its_wheel(outsider: Environment) -> None:
    assert "passed" in outsider.python(KIT)
