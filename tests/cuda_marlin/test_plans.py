"""Plans of launches: whatever the sizes, they fit the card, and every part of the work is somebody's."""

import re
from importlib import resources

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halfbyte_cuda_marlin.cuda import dense, nvrtc, pair, paths, small, wide
from halfbyte_cuda_marlin.cuda.cards import SHARED_MEMORY, Card

SIZES = {
    "tiles": st.integers(1, 4000),
    "units": st.integers(1, 500),
    "unit_bytes": st.sampled_from([2304, 2176]),
    "processors": st.sampled_from([16, 32, 60, 78, 114, 132, 144]),  # the first three: parts of a card
}


#: What a launch may ask for on SM80 and SM87, on SM86, SM89 and SM120, and on Hopper.
LIMITS = st.sampled_from([166_912 - 1024, 101_376 - 1024, SHARED_MEMORY])


@given(m=st.integers(1, 16), limit=LIMITS, **SIZES)
def test_a_plan_for_few_rows_fits_shared_memory_and_divides_k_among_its_warps(
    m, limit, tiles, units, unit_bytes, processors
):
    plan = small.plan(m, tiles, units, unit_bytes, processors, limit)
    assert plan.shared <= limit
    assert plan.wn * plan.wk <= 32
    assert plan.wk <= max(units, 1)
    assert plan.blocks * plan.wn >= tiles
    assert 1 <= plan.chunk <= units
    assert plan.chunk == units or plan.chunk % plan.wk == 0
    assert plan.batch >= 1
    # As small.cu lays it out: rings and their barriers, x once or twice, the sums of the blocks that are kept.
    warps, x_copies = plan.wn * plan.wk, 1 if plan.chunk == units else 2
    rings, sums = warps * plan.stages * (unit_bytes + 8), plan.batch * warps * m * 36 * 4
    assert plan.shared == rings + x_copies * m * (plan.chunk * 256 + 16) + sums
    assert plan.ctas >= 1


@given(m=st.integers(1, pair.MOST_ROWS), limit=LIMITS, **SIZES)
@example(m=1, limit=SHARED_MEMORY, tiles=2640, units=2, unit_bytes=2304, processors=132)
def test_a_plan_for_pairs_fits_shared_memory_and_gives_every_pair_one_block(
    m, limit, tiles, units, unit_bytes, processors
):
    plan = pair.plan(m, tiles, units, unit_bytes, processors, limit)
    if plan is None:
        return
    half = -(-units // 2)
    assert plan.blocks <= processors // 2
    assert plan.blocks * plan.wn >= tiles
    # Every warp has a unit, in either CTA; where x comes in chunks, all of its units are of one tile.
    assert 1 <= plan.warps <= min(16, plan.wn * (units // 2))
    assert plan.wn * 16 <= plan.warps * 32  # a thread for each row that a CTA finishes
    if plan.chunk == half:
        assert plan.step == 1
    else:
        assert plan.chunk < half
        assert plan.step * plan.wn == plan.warps
        assert plan.chunk % plan.step == 0
    # As pair.cu lays it out: rings and barriers, 16 factors and biases for each tile, x in up to four chunks, then the
    # warps' parts and the partner's sums. No two CTAs fit one multiprocessor.
    bars = plan.warps * plan.stages + 2 * 4 + 1
    assert plan.xs == -(-(plan.warps * plan.stages * unit_bytes + bars * 8) // 16) * 16 + plan.wn * 128
    x = min(4, -(-half // plan.chunk)) * m * (plan.chunk * 256 + 16)
    sums = 2 * (plan.warps + plan.wn - 1) * m * 80 + plan.wn * m * 64
    assert plan.parts == plan.xs + x
    assert plan.parts + sums <= plan.shared <= limit
    assert 2 * plan.shared > limit


@given(m=st.integers(1, pair.MOST_ROWS), **SIZES)
def test_the_warps_of_a_pair_find_their_tiles_and_tiles_their_warps(m, tiles, units, unit_bytes, processors):
    plan = pair.plan(m, tiles, units, unit_bytes, processors)
    if plan is None:
        return
    half = -(-units // 2)
    for own in (half, units - half):
        total = plan.wn * own
        starts = torch.arange(plan.warps) * total // plan.warps
        assert torch.equal(_divided(starts + 0.5, own), starts // own)
        owners = torch.bucketize(torch.arange(total), starts, right=True) - 1
        found = _divided((torch.arange(total) + 1) * plan.warps - 0.5, total)
        assert torch.equal(found, owners)


def _divided(numbers: torch.Tensor, by: int) -> torch.Tensor:
    """Whole parts of the quotients, as pair.cu finds them: times a reciprocal, in float32."""
    return (numbers.float() * (1 / torch.tensor(by, dtype=torch.float32))).long()


@pytest.mark.parametrize("tiles", [32, 128, 192, 256])
@pytest.mark.parametrize("units", [8, 32, 112, 224])
def test_pairs_take_the_usual_sizes_on_hopper(tiles: int, units: int):
    assert pair.plan(8, tiles, units, 2304, 132) is not None


@pytest.mark.parametrize(("m", "tiles", "units"), [(20, 541, 224), (778, 43, 224), (1037, 58, 64), (1286, 97, 224)])
def test_where_an_item_follows_every_cta_of_a_cluster_finishes_a_part_of_each(m: int, tiles: int, units: int):
    plan = wide.plan(m, tiles, units, 2304, 132)
    fewest = -(-(m - (plan.token_tiles - 1) * plan.tokens) // 16)
    assert plan.rounds == 1 or fewest >= plan.cluster


@given(m=st.integers(9, 10_000), **SIZES)
def test_a_plan_for_many_rows_fits_shared_memory_and_covers_all(m, tiles, units, unit_bytes, processors):
    plan = wide.plan(m, tiles, units, unit_bytes, processors)
    assert plan.shared <= SHARED_MEMORY
    assert plan.token_tiles * plan.tokens >= m
    assert plan.items // plan.token_tiles * plan.groups * 2 >= tiles
    assert plan.ctas % plan.cluster == 0
    assert plan.ctas <= processors
    assert plan.ctas // plan.cluster * plan.rounds >= plan.items
    assert 1 <= plan.cluster <= units
    # As wide.cu lays it out from a multiple of 1024 on: stages, half a KiB for each warp, barriers.
    stage = -(-(plan.tokens * 256 + plan.groups * 2 * unit_bytes) // 1024) * 1024
    assert plan.shared >= 1023 + plan.stages * stage + plan.groups * 4 * 512 + (2 * plan.stages + 3) * 8


def test_no_number_of_rows_needs_another_kernel_for_many():
    def divisions(m: int) -> tuple[tuple[int, int], ...]:
        """Of the rows by every shape that they may have: with the weights, all that a plan depends on."""
        return tuple((tokens, -(-m // tokens)) for tokens, _ in wide.shapes(m))

    few = [m for m in wide.EVERY_KERNEL if m <= 2048]
    assert {divisions(m) for m in range(9, 2049)} == {divisions(m) for m in few}
    assert len(few) < len(wide.EVERY_KERNEL)  # beyond, one number stands for all
    for tiles, units in ((1, 1), (48, 300), (1000, 64)):
        assert (
            len({wide.macros(wide.plan(m, tiles, units, 2304, 132), mxfp4=False, bf16=True) for m in (2049, 9999)}) == 1
        )


@pytest.mark.parametrize("cluster", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", wide.SHAPES)
@pytest.mark.parametrize("unit_bytes", [2304, 2176])
def test_the_sums_of_a_cluster_fit_where_units_were(unit_bytes: int, shape: tuple[int, int], cluster: int):
    tokens, groups = shape
    plan = wide.division(shape, cluster, 100, 64, unit_bytes, 132)
    # As wide.cu lays it out: for every slice of 16 tokens, the float sums of all rows from each CTA of the cluster.
    places = -(-tokens // 16 // cluster) * cluster
    assert places * 16 * groups * 64 * 4 <= plan.stages * (tokens * 256 + groups * 2 * unit_bytes)


@given(m=st.integers(9, 5000), bf16=st.booleans(), mxfp4=st.booleans(), **SIZES)
def test_the_header_of_matrix_instructions_is_for_the_plan(m, bf16, mxfp4, tiles, units, unit_bytes, processors):
    plan = wide.plan(m, tiles, units, unit_bytes, processors)
    text = nvrtc.headers(dict(wide.macros(plan, mxfp4=mxfp4, bf16=bf16)))["wgmma.cuh"]
    assert f"m64n{plan.tokens}k16.f32.{'bf16' if bf16 else 'f16'}" in text


def test_every_include_of_every_kernel_is_there():
    kernels = resources.files("halfbyte_cuda_marlin.cuda") / "kernels"
    headers = nvrtc.headers({"NTOK": 8, "BF16": 1})
    for kernel in kernels.iterdir():
        for name in re.findall(r'#include "(.*)"', kernel.read_text(encoding="utf-8")):
            assert name in headers


@pytest.mark.parametrize("card", [Card("sm_90a", 132), Card("sm_89", 128, 100_352)], ids=lambda card: card.arch)
@settings(max_examples=10)
@given(tiles=st.integers(1, 1000), units=st.integers(1, 300), mxfp4=st.booleans())
def test_no_call_needs_a_kernel_that_prepare_did_not_load(card, tiles, units, mxfp4):
    asked: set[tuple[str, nvrtc.Macros]] = set()

    def function(kernel: str, _name: str, _device: int, _arch: str, macros: nvrtc.Macros = (), **_: bool) -> None:
        asked.add((kernel, macros))

    def need(m: int) -> None:
        weights = (tiles, units, 2048 + (128 if mxfp4 else 256))
        paths.path((m, tiles * 32, units * 128), weights, torch.bfloat16, torch.device("cuda", 0), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "card_of", lambda *_: card)
        for module in (pair, small, wide, dense):
            patch.setattr(module, "function", function)
        paths.path.cache_clear()
        for m in paths.EVERY_KERNEL:
            need(m)
        loaded = set(asked)
        for m in (*range(1, 70), 100, 1000, 3000, 9999):
            need(m)
        paths.path.cache_clear()
    assert loaded
    assert asked == loaded
