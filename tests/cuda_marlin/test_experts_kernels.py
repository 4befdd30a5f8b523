"""Which of experts' kernels are loaded when: all by prepare, since a call may be captured in a CUDA graph."""

import ctypes
import threading
from typing import Any

import pytest
import torch

from halfbyte.problems import ExpertsProblem
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.cuda import experts, experts_small, experts_wide, routing
from halfbyte_cuda_marlin.cuda.cards import Card

CARD = torch.device("cuda", 0)
LAYERS = [
    {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768},
    {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 14336},
    {"experts": 6, "top_k": 2, "hidden": 64, "intermediate": 160, "activation": "relu2"},
    {"experts": 64, "top_k": 6, "hidden": 7168, "intermediate": 2048, "dtype": "float16"},
]


@pytest.fixture
def compiled() -> list[tuple[str, Any]]:
    """What is compiled before anything is loaded: (file, macros)."""
    return []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, compiled: list[tuple[str, Any]]):
    """The kernels that were asked for: (file, name, macros)."""
    found: set[tuple[str, str, Any]] = set()

    def function(kernel: str, name: str, device: int, arch: str, macros: Any) -> ctypes.c_void_p:
        assert threading.current_thread() is threading.main_thread(), "loading needs the context of the caller's thread"
        found.add((kernel, name, macros))
        return ctypes.c_void_p(1)

    for module in (experts_small, experts_wide, routing):
        monkeypatch.setattr(module, "function", function)
    monkeypatch.setattr(experts, "machine_code", lambda kernel, _arch, macros: compiled.append((kernel, macros)))
    monkeypatch.setattr(experts, "card", lambda _: Card("sm_90a", 132))
    for cached in (experts._chain, experts._load_all, routing.load):
        cached.cache_clear()
    yield found
    for cached in (experts._chain, experts._load_all, routing.load):
        cached.cache_clear()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scheme", ["nvfp4-w4a16", "mxfp4-w4a16"])
def test_no_call_needs_a_kernel_that_prepare_did_not_load(
    scheme: str, layer: dict[str, Any], asked: set[Any], compiled: list[tuple[str, Any]]
):
    problem = ExpertsProblem(scheme=SCHEMES[scheme], **layer)
    experts._load_all(CARD, experts._act(problem), **experts._kinds(problem))
    loaded = set(asked)
    assert set(compiled) == {(kernel, macros) for kernel, _, macros in loaded}
    assert {kernel for kernel, *_ in loaded} == {"experts_small", "experts_wide", "route"}
    for tokens in (*range(1, 40), 100, 127, 200, 333, 541, 1000, 2999, 5000, 20_000):
        for ranks in (1, 8):
            experts._chain(tokens, ranks * problem.experts, problem, CARD)
    assert asked == loaded


@pytest.mark.parametrize("layer", LAYERS)
def test_experts_of_other_ranks_do_not_count_as_work(layer: dict[str, Any], asked: set[Any]):
    problem = ExpertsProblem(scheme=SCHEMES["nvfp4-w4a16"], **layer)
    tokens = 12 * problem.experts // problem.top_k  # about twelve rows for each expert, if all are here
    experts._chain(tokens, 64 * problem.experts, problem, CARD)
    assert {kernel for kernel, *_ in asked} == {"experts_small"}
    asked.clear()
    experts._chain(tokens, problem.experts, problem, CARD)
    assert {kernel for kernel, *_ in asked} == {"experts_wide"}
