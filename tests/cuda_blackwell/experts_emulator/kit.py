"""A pytest plugin that runs the conformance kit over the emulated experts; EMULATED_CAPABILITY names the card.

EMULATED_FAULT breaks something on the way, so that the tests can show that the kit finds it; see faults.py.
EMULATED_ONE_INPUT gives every expert of a layer the same input scales, for kernels that quantize x once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from cuda_blackwell.experts_emulator.faults import FAULTS, one_input_scale
from cuda_blackwell.experts_emulator.patches import emulated
from halfbyte.conformance.environment import Environment
from halfbyte.machines import describe


@pytest.fixture(scope="session")
def kernel_environment() -> Iterator[Environment]:
    capability = int(os.environ["EMULATED_CAPABILITY"])
    layers = one_input_scale if "EMULATED_ONE_INPUT" in os.environ else contextlib.nullcontext
    with emulated(capability), FAULTS[os.environ.get("EMULATED_FAULT", "none")](), layers():
        yield Environment(machine=describe(f"sm_{capability}"), device=torch.device("cpu"))
