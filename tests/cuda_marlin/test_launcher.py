"""Prepared launches, over a driver that only looks at what it is given."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from halfbyte.errors import PluginError
from halfbyte_cuda_marlin.cuda import driver as driver_module
from halfbyte_cuda_marlin.cuda import launcher
from halfbyte_cuda_marlin.cuda.driver import POINTERS, Attribute, Config
from halfbyte_cuda_marlin.cuda.launcher import Launcher, XMap

STREAM = 7


class Arguments(ctypes.Structure):
    _fields_ = (*POINTERS, ("m", ctypes.c_int))


class Driver:
    """Notes every launch; `during` is called while one goes on."""

    def __init__(self) -> None:
        self.launches: list[tuple[Config, list[int | None], int, int]] = []
        self.result = 0
        self.bound = True
        self.during = lambda: None

    def __call__(self, config: int, _kernel: object, parameters: int, _extra: None) -> int:
        if not self.bound:
            return 201
        during, self.during = self.during, lambda: None
        during()
        address = (ctypes.c_void_p * 1).from_address(parameters)[0]
        arguments = Arguments.from_address(address or 0)
        pointers = [getattr(arguments, name) for name, _ in POINTERS]
        self.launches.append((Config.from_buffer_copy(Config.from_address(config)), pointers, arguments.m, config))
        return self.result

    def bind(self, *_: object) -> int:
        """cuCtxSetCurrent."""
        self.bound = True
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()

    def well(*_: object) -> int:
        return 0

    library = SimpleNamespace(
        cuLaunchKernelEx=fake,
        cuGetErrorName=well,
        cuCtxGetCurrent=well,
        cuDeviceGet=well,
        cuDevicePrimaryCtxRetain=well,
        cuCtxSetCurrent=fake.bind,
    )
    monkeypatch.setattr(driver_module, "driver", lambda: library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    return fake


def made(
    *, early: bool = False, x_map: XMap | None = None, sums: tuple[int, int] | None = None, cluster: int = 1
) -> Launcher:
    arguments, grid = Arguments(*(None,) * len(POINTERS), 3), (5, 64, 1024)
    kernel, device = ctypes.c_void_p(1), torch.device("cpu")
    return Launcher(kernel, device, grid, arguments, early=early, x_map=x_map, sums=sums, cluster=cluster)


def tensors() -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(4) for _ in range(5))


def test_every_launch_has_its_own_tensors_and_the_same_numbers(driver: Driver):
    launch = made()
    for _ in range(2):
        x, units, rows, bias, y = tensors()
        launch(x, units, rows, bias, y)
        config, pointers, m, _ = driver.launches[-1]
        assert pointers == [*(t.data_ptr() for t in (x, units, rows, bias, y)), None, None]
        assert m == 3
        assert (config.gx, config.bx, config.shared, config.stream, config.count) == (5, 64, 1024, STREAM, 0)
    x, units, rows, _, y = tensors()
    launch(x, units, rows, None, y)
    assert driver.launches[-1][1][3] is None


def test_a_launch_during_another_uses_other_memory(driver: Driver):
    launch, outer, inner = made(), tensors(), tensors()
    driver.during = lambda: launch(*inner)
    launch(*outer)
    (_, first, _, first_at), (_, second, _, second_at) = driver.launches
    assert (first[0], second[0]) == (inner[0].data_ptr(), outer[0].data_ptr())
    assert first_at != second_at
    launch(*outer)
    assert driver.launches[-1][3] in (first_at, second_at)


def test_an_early_launch_says_so(driver: Driver):
    launch = made(early=True)
    launch(*tensors())
    config = driver.launches[-1][0]
    assert config.count == 1
    attribute = Attribute.from_address(config.attributes)
    assert (attribute.id, attribute.value) == (6, 1)


def test_a_launch_in_clusters_says_how_large_they_are(driver: Driver):
    for early in (False, True):
        launch = made(early=early, cluster=3)
        launch(*tensors())
        config = driver.launches[-1][0]
        attributes = (Attribute * config.count).from_address(config.attributes)
        assert [attribute.id for attribute in attributes] == ([6, 4] if early else [4])
        assert (attributes[-1].value, attributes[-1].second, attributes[-1].third) == (3, 1, 1)


def test_a_launch_that_fails_is_an_error_and_the_next_one_works(driver: Driver):
    launch = made()
    driver.result = 700
    with pytest.raises(PluginError, match=r"cuLaunchKernelEx failed with an error \(700\); .* an earlier kernel"):
        launch(*tensors())
    driver.result = 0
    launch(*tensors())
    assert len(driver.launches) == 2


def test_a_thread_without_a_context_gets_the_devices(driver: Driver):
    driver.bound = False
    made()(*tensors())
    assert len(driver.launches) == 1


def test_the_map_of_x_is_made_anew_where_x_is_elsewhere_alone(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    mapped: list[int] = []
    monkeypatch.setattr(launcher, "encode_map", lambda _at, x, *_, **__: mapped.append(x))
    launch, first, second = made(x_map=XMap((4, 64), 32, True)), tensors(), tensors()
    for own in (first, first, second, first):
        launch(*own)
    assert mapped == [first[0].data_ptr(), second[0].data_ptr(), first[0].data_ptr()]


def test_partial_sums_and_counters_are_the_last_pointers(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    part, counter = torch.zeros(8), torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(launcher, "workspace", lambda _device, sums, counters: (part[:sums], counter[:counters]))
    made(sums=(8, 2))(*tensors())
    assert driver.launches[-1][1][5:] == [part.data_ptr(), counter.data_ptr()]
