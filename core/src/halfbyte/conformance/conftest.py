"""Cases bound to the environment; the cases themselves come from the plugin's parametrization."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from halfbyte.conformance.environment import Environment
from halfbyte.conformance.subject import Subject


@pytest.fixture(scope="session", autouse=True)
def one_cpu_thread(kernel_environment: Environment) -> Iterator[None]:
    """On a CPU, math libraries split sums by how busy the cores are: the same call then gives other last bits."""
    threads = torch.get_num_threads()
    if kernel_environment.device.type == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _bound(name: str) -> Callable[..., Subject]:
    @pytest.fixture(name=name)
    def bind(request: pytest.FixtureRequest, kernel_environment: Environment) -> Subject:
        return Subject(request.param, kernel_environment)

    return bind


linear_case = _bound("linear_case")
linear_setting = _bound("linear_setting")
linear_scheme = _bound("linear_scheme")
experts_case = _bound("experts_case")
experts_scheme = _bound("experts_scheme")
