"""Routing's bounds and the plans of experts' kernels: whatever the sizes, they fit, and nothing is left out."""

from hypothesis import given
from hypothesis import strategies as st

from halfbyte_cuda_marlin.cuda import experts_small, routing
from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY


@given(counts=st.lists(st.integers(0, 200), min_size=1, max_size=64), block=st.integers(1, 64))
def test_no_routing_has_more_blocks_than_there_is_room_for(counts: list[int], block: int):
    blocks = sum(-(-count // block) for count in counts)
    assert blocks <= routing.most_blocks(sum(counts), len(counts), block)


@given(experts=st.integers(1, 64), slots=st.integers(1, 500), block=st.integers(1, 64))
def test_some_routing_fills_all_the_room(experts: int, slots: int, block: int):
    hit = min(experts, slots)
    counts = [1] * (hit - 1) + [slots - hit + 1]
    assert sum(-(-count // block) for count in counts) == routing.most_blocks(slots, experts, block)


@given(
    slots=st.integers(1, 20_000),
    here=st.integers(1, 20_000),
    experts=st.integers(1, 512),
    block=st.sampled_from([None, 1, 2]),
    tiles=st.integers(1, 2000),
    units=st.integers(1, 200),
    unit_bytes=st.sampled_from([2304, 2176]),
    processors=st.sampled_from([78, 114, 132]),
    partial=st.booleans(),
)
def test_a_plan_fits_the_card_and_its_splits_cover_k(
    slots, here, experts, block, tiles, units, unit_bytes, processors, partial
):
    plan = experts_small.plan(
        slots, min(slots, here), experts, block, tiles, units, unit_bytes, processors, partial=partial
    )
    assert 1 <= plan.block <= 16
    assert block in (None, plan.block)
    assert experts_small.WARPS % plan.wk == 0
    assert plan.splits == 1 or partial
    # The last split has something to do, and all of them together all of K.
    assert plan.chunk * (plan.splits - 1) < units <= plan.chunk * plan.splits
    # As experts_small.cu lays it out: rings and barriers, the list of blocks, x, the sums of teams.
    sums = 2 * experts_small.WARPS * (2 if plan.block > 8 else 1) * 1024 if plan.wk > 1 else 0
    rings = experts_small.WARPS * plan.stages * (unit_bytes + 8) + 32
    x = plan.buffers * plan.block * (plan.chunk * 256 + 16)
    assert plan.shared == rings + 16 * plan.list + x + sums
    assert plan.shared <= SHARED_MEMORY
    # No CTA meets more blocks than its list has room for.
    items = routing.most_blocks(slots, experts, plan.block) * plan.splits * tiles
    per_block, share = plan.splits * tiles, -(-items // plan.ctas)
    assert plan.list >= (share + per_block - 2) // per_block + 1
