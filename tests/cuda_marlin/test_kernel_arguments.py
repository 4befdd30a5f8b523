"""What launchers hand to kernels is what these declare."""

import re
from types import ModuleType
from typing import Any

import pytest
import torch

from halfbyte_cuda_marlin.cuda import experts_small, experts_wide, nvrtc, pair, small, wide
from halfbyte_cuda_marlin.cuda.cards import Card

CARD = Card("sm_90a", 132)
SHAPE, WEIGHTS = (20, 5120, 4096), (160, 32, 2304)


@pytest.mark.parametrize("module", [experts_small, experts_wide, pair, small, wide], ids=lambda module: module.__name__)
def test_arguments_have_the_order_and_the_kinds_that_the_kernel_declares(module: ModuleType):
    source = nvrtc.source(module.__name__.rpartition(".")[2])
    body = source.partition("struct Args {")[2].partition("};")[0]
    declared = [
        (piece.split()[-1].lstrip("*"), "*" in declaration)
        for declaration in re.sub(r"//.*", "", body).split(";")
        for piece in declaration.split(",")
        if piece.strip()
    ]
    fields = [(name, kind.__name__ == "c_void_p") for name, kind in module._Args._fields_]
    assert fields == declared


@pytest.mark.parametrize(
    ("kernel", "macro", "value"),
    [
        ("pair", "XBUF", pair._CHUNKS),
        ("pair", "PART", pair._PART),
        ("small", "REDS", small._TOKEN_FLOATS),
        ("wide", "STAGING", wide._STAGING),
        ("wide", "SLICE", wide._SLICE),
    ],
)
def test_numbers_by_which_python_plans_are_the_kernels(kernel: str, macro: str, value: int):
    assert re.findall(rf"#define {macro} (\d+)", nvrtc.source(kernel)) == [str(value)]


class Launched:
    """In place of a Launcher: what it was made with."""

    def __init__(self, _kernel: object, _device: object, grid: tuple[int, int, int], arguments: Any, **options: Any):
        self.grid, self.arguments, self.options = grid, arguments, options


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The macros of the kernel that was asked for last."""
    macros: dict[str, int] = {}
    for module in (pair, wide):
        monkeypatch.setattr(module, "Launcher", Launched)
        monkeypatch.setattr(module, "function", lambda *asked: macros.update(asked[-1]))
    return macros


def numbers(launched: Launched) -> dict[str, int]:
    """A launch's arguments that are no addresses."""
    fields = type(launched.arguments)._fields_[7:]
    return {name: getattr(launched.arguments, name) for name, *_ in fields}


@pytest.mark.parametrize("m", [17, 32, 100, 5000])
def test_a_launch_for_many_rows_is_its_plan(m: int, compiled: dict[str, int]):
    plan = wide.plan(m, *WEIGHTS, CARD.processors)
    launched: Any = wide.launcher((m, *SHAPE[1:]), WEIGHTS, torch.bfloat16, torch.device("cuda", 0), CARD)
    assert launched.grid == (plan.ctas, (compiled["WGS"] + 1) * 128, plan.shared)  # one warpgroup more fetches
    assert launched.options["cluster"] == plan.cluster
    x_map = launched.options["x_map"]
    assert (x_map.shape, x_map.rows, x_map.bf16) == ((m, 4096), compiled["NTOK"], True)
    sizes = {"m": m, "n": 5120, "units": 32, "tiles": 160, "items": plan.items, "ttiles": plan.token_tiles}
    assert numbers(launched) == sizes


@pytest.mark.parametrize("m", [1, 20])
def test_a_launch_in_pairs_is_its_plan(m: int, compiled: dict[str, int]):
    plan = pair.plan(m, *WEIGHTS, CARD.processors)
    assert plan is not None
    launched: Any = pair.launcher(plan, (m, *SHAPE[1:]), WEIGHTS, torch.float16, torch.device("cuda", 0), CARD)
    assert launched.grid == (2 * plan.blocks, compiled["WARPS"] * 32, plan.shared)
    assert "cluster" not in launched.options  # pair.cu says it itself
    sizes = {"m": m, "n": 5120, "k": 4096, "units": 32, "tiles": 160, "xstride": plan.chunk * 256 + 16}
    assert numbers(launched) == sizes | {name: getattr(plan, name) for name in ("wn", "chunk", "step", "xs", "parts")}
