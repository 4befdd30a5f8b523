"""Doubles of the libraries, and a fixture to run the conformance kit over them.

    pytest -p halfbyte.conformance -p halfbyte_xpu.testing --pyargs halfbyte.conformance --kernel xpu.fp4-gemm

Nothing here proves a device. It proves that our kernels ask the libraries for the right thing, as far as their
contracts are known; docs/xpu.md says how each part of them is.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from halfbyte import describe
from halfbyte.conformance.environment import Environment


def install_doubles() -> None:
    """Put doubles in the place of all three libraries, for this process."""
    from halfbyte_xpu.testing import ipex, scaled_mm, vllm

    vllm.install()
    ipex.install()
    F.scaled_mm = scaled_mm.scaled_mm  # type: ignore[assignment]


@pytest.fixture(scope="session")
def kernel_environment() -> Environment:
    """A described Battlemage whose libraries are doubles that compute on the CPU."""
    return double_environment()


def double_environment() -> Environment:
    """What the fixture returns, with the doubles in place."""
    install_doubles()
    return Environment(machine=describe("xpu-bmg"), device=torch.device("cpu"))
