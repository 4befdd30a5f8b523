"""A pytest plugin that runs the conformance kit over the emulated experts; EMULATED_CAPABILITY names the card.

EMULATED_FAULT breaks something on the way, so that the tests can show that the kit finds it; see faults.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from cuda_blackwell.experts_emulator.faults import FAULTS
from cuda_blackwell.experts_emulator.patches import emulated
from halfbyte.conformance.environment import Environment
from halfbyte.machines import describe


@pytest.fixture(scope="session")
def kernel_environment() -> Iterator[Environment]:
    capability = int(os.environ["EMULATED_CAPABILITY"])
    with emulated(capability), FAULTS[os.environ.get("EMULATED_FAULT", "none")]():
        yield Environment(machine=describe(f"sm_{capability}"), device=torch.device("cpu"))
