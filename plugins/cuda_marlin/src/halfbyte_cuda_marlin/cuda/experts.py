"""marlin.cuda: weight-only experts by our own kernels. One packed layout serves every number of tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, cast

import torch
from torch import Tensor

from halfbyte.kernels import Packed
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_marlin.cuda import experts_small, experts_wide, routing
from halfbyte_cuda_marlin.cuda.card_packing import pack_codes_on_card
from halfbyte_cuda_marlin.cuda.cards import card
from halfbyte_cuda_marlin.cuda.experts_packing import pack_experts
from halfbyte_cuda_marlin.cuda.nvrtc import machine_code
from halfbyte_cuda_marlin.cuda.packing import CODE_BYTES, UNIT_COLUMNS, UNIT_ROWS

#: The numbers that experts.cuh gives the activation functions.
ACTIVATIONS: Final = {"silu": 1, "gelu_tanh": 2, "swigluoai": 3, "relu2": 4}
#: Rows that an expert has on average from which on the kernel for many rows is faster.
_MANY: Final = 11
#: Slots that need no sorting, at most.
_ALONE: Final = 32
#: The kernels load 16 bytes at a time.
_ALIGNMENT: Final = 16


class MarlinCudaExperts:
    """Keeps codes and scales in units of 32 x 128; see experts_packing.py. Needs Hopper."""

    def prepare(self, weights: ExpertsWeights, problem: ExpertsProblem) -> dict[str, Tensor]:
        """Rearrange the weights on their device, and compile the kernels that the layer can need.

        The tensors are those of `experts_packing.pack_experts`. PluginError with NVRTC's log if a kernel does not
        compile.
        """
        dtype = getattr(torch, problem.dtype)
        with torch.cuda.device(weights.up.packed.device):
            arch = card(weights.up.packed.device.index or 0).arch
            tensors = pack_experts(weights, dtype, functools.partial(pack_codes_on_card, arch=arch))
            _load_all(tensors["first"].device, _act(problem), **_kinds(problem))
        return tensors

    def apply(
        self, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None
    ) -> Tensor:
        """Return y [T, H]; sums in float32, in an order that depends on the sizes alone."""
        problem = cast("ExpertsProblem", packed.problem)
        numbers = problem.experts if expert_map is None else expert_map.numel()
        run = _chain(x.shape[0], numbers, problem, x.device)
        aligned = x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
        if x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return run(aligned, packed.tensors, topk_ids, topk_weights, expert_map)
        return run(aligned, packed.tensors, topk_ids, topk_weights, expert_map)


#: y of (x, packed tensors, ids, weights, expert map).
_Run = Callable[[Tensor, Mapping[str, Tensor], Tensor, Tensor, "Tensor | None"], Tensor]


@functools.lru_cache(maxsize=16_384)
def _chain(tokens: int, numbers: int, problem: ExpertsProblem, device: torch.device) -> _Run:
    """How a number of tokens is computed; `numbers`: how many experts there are everywhere.

    Kernels are compiled if need be. Which are faster was measured on one H200.
    """
    slots = tokens * problem.top_k
    here = math.ceil(slots * min(1, problem.experts / numbers))
    few = here < _MANY * problem.experts
    return _few(slots, here, problem, device) if few else _many(here, problem, device)


def _few(slots: int, here: int, problem: ExpertsProblem, device: torch.device) -> _Run:
    """`here`: how many slots are expected to have an expert here."""
    # So few that hardly two go to the same expert: each is its own block, and nothing needs sorting.
    alone = slots <= _ALONE and here * here <= 2 * problem.experts
    experts, (first_size, down_size) = problem.experts, _sizes(problem, device)
    first = experts_small.plan(slots, here, experts, 1 if alone else None, *first_size)
    down = experts_small.plan(slots, here, experts, first.block, *down_size, partial=True)
    first_kernel = experts_small.load(first, device, **_kinds(problem), act=_act(problem), gather=True)
    down_kernel = experts_small.load(down, device, **_kinds(problem), act=0, gather=False)
    return functools.partial(
        _run,
        problem,
        0 if alone else first.block,
        (down.splits,),
        functools.partial(experts_small.run, first_kernel, first, early=not alone),
        functools.partial(experts_small.run, down_kernel, down, early=True),
    )


def _many(here: int, problem: ExpertsProblem, device: torch.device) -> _Run:
    experts, (first_size, down_size) = problem.experts, _sizes(problem, device)
    first = experts_wide.plan(here, experts, None, *first_size)
    down = experts_wide.plan(here, experts, first.block, *down_size)
    first_kernel = experts_wide.load(first, device, **_kinds(problem), act=_act(problem))
    down_kernel = experts_wide.load(down, device, **_kinds(problem), act=0)
    return functools.partial(
        _run,
        problem,
        first.block,
        (),
        functools.partial(experts_wide.run, first_kernel, first, gather=True),
        functools.partial(experts_wide.run, down_kernel, down, gather=False),
    )


def _run(
    problem: ExpertsProblem,
    block: int,
    splits: tuple[int, ...],
    first: Callable[..., None],
    down: Callable[..., None],
    x: Tensor,
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    weights: Tensor,
    expert_map: Tensor | None,
) -> Tensor:
    """One kernel after the other: routing into blocks of rows (0: none), the two products, the weighted sum.

    `splits`: how many partial sums, in float32, the down projection gives for each result; (): results in x's dtype.
    """
    slots = ids.numel()
    if block:
        routed = routing.route(ids, expert_map, problem.experts, block)
    else:
        routed = routing.alone(ids, expert_map, problem.experts)
    hidden = x.new_empty(slots, problem.intermediate)
    first(x, tensors["first"], tensors["first_rows"], tensors.get("first_bias"), hidden, routed)
    results = x.new_empty(*splits, slots, problem.hidden, dtype=torch.float32 if splits else x.dtype)
    down(hidden, tensors["down"], tensors["down_rows"], tensors.get("down_bias"), results, routed)
    y = torch.empty_like(x)
    routing.weighted_sum(results, routed, weights, y)
    return y


@functools.cache
def _load_all(device: torch.device, act: int, **kinds: bool) -> None:
    """Compile, side by side, and load every kernel that any call can need: a call may be captured in a graph."""
    small = [(own, *kind) for own in experts_small.KINDS for kind in ((act, True), (0, False))]
    wide = [
        (experts_wide.Plan(rows, shape.groups, shape.stages, shape.buffers, 1, 1, 0), kind)
        for rows, shapes in experts_wide.SHAPES.items()
        for shape in shapes
        for kind in (act, 0)
    ]
    sources = [("experts_small", experts_small.macros(own, **kinds, act=a, gather=g)) for own, a, g in small]
    sources += [("experts_wide", experts_wide.macros(own, **kinds, act=a)) for own, a in wide]
    around = routing.kinds(bf16=kinds["bf16"])
    sources += [("route", routing.macros(**options)) for _, options in around]
    arch = card(device.index or 0).arch
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source: machine_code(source[0], arch, source[1]), sources))
    # Loading needs the context of this thread.
    for name, options in around:
        routing.load(name, device, **options)
    for few, a, gather in small:
        experts_small.load(few, device, **kinds, act=a, gather=gather)
    for many, a in wide:
        experts_wide.load(many, device, **kinds, act=a)


def _kinds(problem: ExpertsProblem) -> dict[str, bool]:
    return {"mxfp4": not problem.scheme.weights.has_global_scale, "bf16": problem.dtype == "bfloat16"}


def _act(problem: ExpertsProblem) -> int:
    return ACTIVATIONS[problem.activation]


def _sizes(problem: ExpertsProblem, device: torch.device) -> tuple[tuple[int, int, int, int], ...]:
    """(tiles, units, bytes of a unit, processors) of both products."""
    processors = card(device.index or 0).processors
    unit_bytes = CODE_BYTES + (256 if problem.scheme.weights.has_global_scale else 128)
    rows = problem.intermediate * (2 if problem.gated else 1)
    return tuple(
        (n // UNIT_ROWS, -(-k // UNIT_COLUMNS), unit_bytes, processors)
        for n, k in ((rows, problem.hidden), (problem.hidden, problem.intermediate))
    )
