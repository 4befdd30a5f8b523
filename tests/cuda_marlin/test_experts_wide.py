"""Plans of the grouped product for experts with many rows each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte_cuda_marlin.cuda import experts_wide, nvrtc
from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY

BLOCKS = sorted(experts_wide.SHAPES)
SIZES = {
    "slots": st.integers(1, 100_000),
    "experts": st.integers(1, 512),
    "tiles": st.integers(1, 2000),
    "units": st.integers(1, 300),
    "unit_bytes": st.sampled_from([2304, 2176]),
    "processors": st.sampled_from([78, 114, 132]),
}


@given(block=st.sampled_from([None, *BLOCKS]), **SIZES)
def test_a_plan_fits_shared_memory_and_covers_all_weights(block, slots, experts, tiles, units, unit_bytes, processors):
    plan = experts_wide.plan(slots, experts, block, tiles, units, unit_bytes, processors)
    assert block in (None, plan.block)
    assert plan.shared <= SHARED_MEMORY
    assert plan.parts * plan.groups * 2 >= tiles > (plan.parts - 1) * plan.groups * 2
    assert 1 <= plan.ctas <= processors
    # One warp asks for all of x: two halves of as many boxes as the block has steps.
    assert 2 * plan.block // experts_wide.STEP <= 32


@pytest.mark.parametrize("block", BLOCKS)
def test_there_is_a_matrix_instruction_for_every_number_of_steps(block: int):
    plan = experts_wide.plan(1000, 8, block, 64, 16, 2304, 132)
    values = dict(experts_wide.macros(plan, mxfp4=True, bf16=False, act=1))
    text = nvrtc.headers(values)["wgmma.cuh"]
    for tokens in range(experts_wide.STEP, plan.block + 1, experts_wide.STEP):
        assert f"m64n{tokens}k16.f32.f16" in text
