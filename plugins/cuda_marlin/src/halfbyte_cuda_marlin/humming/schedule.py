"""Which of humming's tiles serves how many rows. Sums over K stay within one CTA, in float32.

humming's own choice splits K over CTAs ("stream-K"), which add their parts up in the result, in 16 bits and mostly by
atomics: results change from run to run, with relative errors of 2.4e-3 to 4.0e-3 in bfloat16 (H200). Without that
it is 1.7e-3, and small matrices need small tiles to fill the card: `TILES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

#: Upper ends of the ranges of rows that one kernel serves; one more serves all above.
ROWS: Final = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_ALL: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows x columns of the result that one CTA computes, and what that costs."""

    rows: int
    columns: int
    #: Of K: a stage of the CTA, a warp's share of it.
    depth: int
    warp_columns: int
    warp_depth: int
    ctas: int
    #: Microseconds of one wave at K = 4096 on an H200, NVFP4 in bfloat16.
    cost: float

    @property
    def config(self) -> dict[str, Any]:
        """The same as humming's TuningConfig."""
        wide = self.columns > 64 and self.rows > 16
        return {
            "mma_type": "wgmma" if wide else "mma",
            "block_shape": [self.rows, self.columns, self.depth],
            "warp_shape": [self.rows, self.warp_columns, self.warp_depth],
            "num_stages": 4,
            "num_ctas_per_sm": self.ctas,
            "use_warp_spec": wide,
            "use_tma": wide,
        }


#: Measured on one H200 (4096x4096 and 28672x4096). Depths divide packing.MULTIPLE or are halved to.
TILES: Final = (
    Tile(8, 64, 256, 64, 32, 1, 10.1),
    Tile(16, 64, 256, 64, 32, 1, 11.2),
    Tile(32, 64, 256, 64, 32, 1, 14.0),
    Tile(8, 128, 128, 64, 32, 2, 29.8),
    Tile(16, 128, 128, 64, 32, 2, 33.3),
    Tile(32, 128, 128, 32, 64, 1, 20.6),
    Tile(64, 128, 128, 32, 64, 1, 24.0),
    Tile(128, 128, 64, 32, 64, 2, 57.3),
    Tile(128, 256, 64, 32, 64, 1, 53.5),
    Tile(176, 256, 64, 32, 64, 1, 62.5),
)


def dense(n: int, k: int, processors: int) -> list[list[Any]]:
    """Ranges of rows on Hopper, as humming takes them: [above, up to, config] with the fastest tile of `TILES`."""

    def fastest(rows: int) -> dict[str, Any]:
        def cost(tile: Tile) -> float:
            tiles = -(-rows // tile.rows) * (n // tile.columns)
            return -(-tiles // (tile.ctas * processors)) * tile.cost

        return min((tile for tile in TILES if n % tile.columns == 0), key=cost).config

    return ranges(ROWS, lambda rows: _fitted(fastest(rows), k))


def ranges(ends: tuple[int, ...], choose: Callable[[int], dict[str, Any]]) -> list[list[Any]]:
    """[above, up to, config] for all numbers of rows, no K split; neighbours with one config are one range."""
    return list(_merged(ends, choose))


def _merged(ends: tuple[int, ...], choose: Callable[[int], dict[str, Any]]) -> Iterator[list[Any]]:
    above, config = 0, choose(ends[0])
    for end, following in zip(ends, [*(choose(end) for end in ends[1:]), choose(2 * ends[-1])], strict=True):
        if following != config:
            yield [above, end, config | {"use_stream_k": False}]
            above, config = end, following
    yield [above, _ALL, config | {"use_stream_k": False}]


def _fitted(config: dict[str, Any], k: int) -> dict[str, Any]:
    """The config with a depth that divides K."""
    rows, columns, depth = config["block_shape"]
    while k % depth:
        depth //= 2
    return config | {"block_shape": [rows, columns, depth]}
