"""What a plugin's author writes to run the kit over a double of the vendor's library."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

from halfbyte import describe
from halfbyte.conformance.environment import Environment

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def kernel_environment() -> Iterator[Environment]:
    double = ModuleType("doubled_vendor")
    double.checked = lambda y: y  # type: ignore[attr-defined]
    sys.modules[double.__name__] = double
    yield Environment(describe("sm_100"), torch.device("cpu"))
    del sys.modules[double.__name__]
