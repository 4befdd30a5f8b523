"""A pytest plugin: the conformance kit's layers have one input scale for all experts. Nothing is emulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cuda_blackwell.experts_emulator.faults import one_input_scale


@pytest.fixture(autouse=True, scope="session")
def layers_with_one_input_scale() -> Iterator[None]:
    with one_input_scale():
        yield
