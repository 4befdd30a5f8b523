"""Whose units are whose in kernels/pair.cu: its arithmetic by the plan's numbers, for every warp of both CTAs."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from halfbyte_cuda_marlin.cuda import pair

#: Bytes of a Hopper multiprocessor's shared memory, and what of it each block of threads takes beside what it asks for.
MULTIPROCESSOR, RESERVED = 228 * 1024, 1024


@dataclass(frozen=True)
class Step:
    """A unit of a warp: its tile, which of the CTA's units of K it is, and where its x is: slot, bytes into rows."""

    tile: int
    unit: int
    slot: int
    offset: int


@dataclass(frozen=True)
class Work:
    """One CTA's: `units` of K in each of `tiles`."""

    plan: pair.Plan
    units: int
    tiles: int
    whole: bool

    @property
    def total(self) -> int:
        """Units of a full block."""
        return self.plan.wn * self.units

    def first(self, warp: int) -> tuple[int, int]:
        """The tile and the unit of it with which a warp begins."""
        tile, unit = divmod(warp * self.total // self.plan.warps, self.units)
        return tile, unit if self.whole else warp % self.plan.step

    def count(self, warp: int) -> int:
        """How many units a warp multiplies; none where it is not positive."""
        begin, end = (self.total * edge // self.plan.warps for edge in (warp, warp + 1))
        strided = -(-(self.units - warp % self.plan.step) // self.plan.step)
        return min(end - begin if self.whole else strided, self.tiles * self.units - begin)

    def fetched(self, warp: int, columns: int) -> list[int]:
        """Places of the warp's units within the block, each tile of which has `columns` units of K."""
        tile, unit = self.first(warp)
        left, until, at, places = self.count(warp), self.units - unit, tile * columns + unit, []
        for _ in range(left):
            places.append(at)
            at += self.plan.step
            until -= 1
            if self.whole and until == 0:
                at, until = at + columns - self.units, self.units
        return places

    def steps(self, warp: int) -> Iterator[Step]:
        """What the warp multiplies, chunk after chunk of x."""
        tile, unit = self.first(warp)
        for turn, begin in enumerate(range(0, self.units, self.plan.chunk)):
            end = min(begin + self.plan.chunk, self.units)
            if self.whole:
                for place in range(unit, unit + self.count(warp)):
                    yield Step(tile + place // self.units, place % self.units, 0, place % self.units * 256)
            elif self.count(warp) > 0:
                for place in range(begin + unit, end, self.plan.step):
                    yield Step(tile, place, turn % 4, (place - begin) * 256)

    def warps_of(self, tile: int) -> range:
        """The warps whose sums of a tile are added up."""
        ends = (tile * self.units, (tile + 1) * self.units - 1)
        begin, last = ((2 * (end + 1) * self.plan.warps - 1) // (2 * self.total) for end in ends)
        return range(begin, last + 1)


@given(
    m=st.integers(1, pair.MOST_ROWS),
    tiles=st.one_of(st.integers(1, 300), st.integers(1, 2500)),
    units=st.one_of(st.integers(2, 20), st.integers(2, 400)),
    unit_bytes=st.sampled_from([2304, 2176]),
    processors=st.sampled_from([16, 32, 60, 78, 114, 132, 144]),
    rank=st.integers(0, 1),
    last=st.booleans(),
)
@example(m=16, tiles=256, units=224, unit_bytes=2304, processors=132, rank=1, last=True)
@example(m=32, tiles=500, units=31, unit_bytes=2304, processors=132, rank=1, last=True)
@example(m=1, tiles=192, units=33, unit_bytes=2176, processors=132, rank=1, last=True)
def test_every_unit_of_a_pair_is_multiplied_once_by_its_x_and_its_sum_is_found(
    m, tiles, units, unit_bytes, processors, rank, last
):
    plan = pair.plan(m, tiles, units, unit_bytes, processors)
    assume(plan is not None)
    assert plan is not None
    half = -(-units // 2)
    here = tiles - (plan.blocks - 1) * plan.wn if last else min(plan.wn, tiles)
    work = Work(plan, units - half if rank else half, here, plan.chunk == half)
    found: dict[tuple[int, int], int] = {}
    for warp in range(plan.warps):
        steps = list(work.steps(warp))
        assert [step.tile * units + step.unit for step in steps] == work.fetched(warp, units)
        for step in steps:
            assert step.offset + 256 <= plan.chunk * 256
            assert plan.xs + (step.slot + 1) * m * (plan.chunk * 256 + 16) <= plan.parts
            assert found.setdefault((step.tile, step.unit), warp) == warp
        assert len({(step.tile, step.unit) for step in steps}) == len(steps)
    assert found.keys() == {(tile, unit) for tile in range(here) for unit in range(work.units)}
    for tile in range(here):
        assert {found[tile, unit] for unit in range(work.units)} == set(work.warps_of(tile))


@pytest.mark.parametrize("m", [1, 16, 32])
@pytest.mark.parametrize("units", [2, 8, 32])
def test_no_two_blocks_of_a_pair_fit_one_multiprocessor(m: int, units: int):
    plan = pair.plan(m, 64, units, 2304, 132)
    assert plan is not None
    assert 2 * (plan.shared + RESERVED) > MULTIPROCESSOR
