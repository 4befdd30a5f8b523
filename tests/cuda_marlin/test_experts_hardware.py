"""Experts on a Hopper card: routing, and the sizes at which the chain of kernels changes."""

import pytest
import torch

from halfbyte.conformance import data, oracle
from halfbyte.conformance.subject import on_device
from halfbyte.conformance.tolerances import errors, tolerance
from halfbyte.kernels import Packed
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.cuda import routing
from halfbyte_cuda_marlin.cuda.experts import MarlinCudaExperts

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an SM90 card"
    ),
]


@pytest.mark.parametrize("block", [8, 16, 64, 256])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (33, 128, 8), (700, 60, 4), (3000, 8, 8)])
def test_every_slot_is_in_one_block_of_its_expert(tokens: int, experts: int, top_k: int, block: int):
    ids, _ = data.routing(tokens, 2 * experts, top_k)
    ids[0] = torch.tensor([-1, 2 * experts, *ids[0, 2:]])[:top_k]  # no experts at all
    expert_map = torch.full((2 * experts,), -1, dtype=torch.int32)
    expert_map[torch.randperm(2 * experts, generator=torch.Generator().manual_seed(0))[:experts]] = torch.arange(
        experts, dtype=torch.int32
    )
    valid = (ids >= 0) & (ids < 2 * experts)
    local = torch.where(valid, expert_map[ids.clamp(0, 2 * experts - 1).long()], -1).flatten().tolist()
    found = routing.route(ids.cuda(), expert_map.cuda(), experts, block)
    torch.cuda.synchronize()
    blocks = found.blocks[: int(found.count)].tolist()
    source, position = found.source.tolist(), found.position.tolist()
    seen: list[int] = []
    for expert, first, rows, _ in blocks:
        assert 1 <= rows <= block
        slots = source[first : first + rows]
        assert all(local[slot] == expert for slot in slots)
        assert all(position[slot] == first + row for row, slot in enumerate(slots))
        seen += slots
    assert sorted(seen) == [slot for slot, expert in enumerate(local) if expert >= 0]
    assert all(position[slot] == -1 for slot, expert in enumerate(local) if expert < 0)
    assert not any(found.tickets.tolist())
    # Blocks of one expert are neighbours, and know which of how many they are.
    for expert in {block[0] for block in blocks}:
        places = [(index, block[3]) for index, block in enumerate(blocks) if block[0] == expert]
        assert [place for _, place in places] == [len(places) << 16 | number for number in range(len(places))]
        assert [index for index, _ in places] == list(range(places[0][0], places[0][0] + len(places)))


@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 40, 90, 300, 1500])
@pytest.mark.parametrize("scheme", ["nvfp4-w4a16", "mxfp4-w4a16"])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "intermediate"), [(32, 4, 1440, 704), (8, 2, 512, 8192), (64, 8, 8192, 96)]
)
def test_experts_are_right_whatever_chain_is_taken(
    experts: int, top_k: int, hidden: int, intermediate: int, scheme: str, tokens: int
):
    weights = on_device(
        data.experts_weights(SCHEMES[scheme], experts, hidden, intermediate, dtype=torch.bfloat16, bias=True),
        torch.device("cuda"),
    )
    problem = weights.problem(torch.bfloat16, top_k=top_k, activation="swigluoai")
    kernel = MarlinCudaExperts()
    packed = Packed(problem, kernel.prepare(weights, problem))
    x = data.activations(tokens, hidden, torch.bfloat16).cuda()
    ids, routing_weights = (tensor.cuda() for tensor in data.routing(tokens, experts, top_k))
    y = kernel.apply(x, packed, ids, routing_weights)
    expected = oracle.experts(x, weights, ids, routing_weights, activation="swigluoai", rounding=None)
    assert errors(y, expected).within(tolerance("experts", scheme[:5], "bfloat16", quantizes=False))
    assert torch.equal(y, kernel.apply(x, packed, ids, routing_weights))
