"""Doubles of Intel's libraries, in this process."""

import pytest
import torch.nn.functional as F

from halfbyte_xpu.testing import ipex, scaled_mm, vllm


@pytest.fixture
def doubles(monkeypatch):
    """The operators stay registered for the process; torch's own function is put back."""
    vllm.install()
    ipex.install()
    monkeypatch.setattr(F, "scaled_mm", scaled_mm.scaled_mm)
