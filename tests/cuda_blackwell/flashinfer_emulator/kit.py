"""A pytest plugin that runs the conformance kit over the emulated library; EMULATED_CAPABILITY names the card."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from cuda_blackwell.flashinfer_emulator.patches import emulated
from halfbyte.conformance.environment import Environment
from halfbyte.machines import describe


@pytest.fixture(scope="session")
def kernel_environment() -> Iterator[Environment]:
    capability = int(os.environ["EMULATED_CAPABILITY"])
    with emulated(capability):
        yield Environment(machine=describe(f"sm_{capability}"), device=torch.device("cpu"))
