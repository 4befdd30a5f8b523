"""The figures of the benchmarks of kernels, and the tables that are made of them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.benchmark import DENSE

OURS = "marlin.cuda"
#: humming with its own schedule; see peer_humming.py.
HUMMING = "humming"
PEERS = ("marlin.vllm", "marlin.humming", HUMMING, "flashinfer.cutile", DENSE)
#: Built in, and no peers: they dequantize.
LEFT_OUT = ("reference", "dequantized")


@dataclass(frozen=True, slots=True)
class Point:
    """One number of rows of one problem: microseconds and mean errors by kernel."""

    problem: str
    m: int
    us: dict[str, float]
    errors: dict[str, float]

    def ratio(self, peers: Iterable[str] = PEERS) -> float | None:
        """Time of the fastest of these peers / our time; None if one side was not measured."""
        best = min((self.us[peer] for peer in peers if peer in self.us), default=None)
        return None if best is None or OURS not in self.us else best / self.us[OURS]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the figures of one script are shown: bands of rows, and tables, by title, of problems by column."""

    bands: Sequence[tuple[int, int]]
    tables: Mapping[str, Mapping[str, str]]

    def shown(self, found: Mapping[str, Any]) -> dict[str, str]:
        """Every table of the figures that a script kept, by title: the layout's own, "ratios" and "errors"."""
        every = [Point(**point) for point in found["points"]]
        names = {point.problem for point in every}
        shown = {
            title: _times(every, {column: name for column, name in columns.items() if name in names})
            for title, columns in self.tables.items()
            if names & set(columns.values())
        }
        return shown | {"ratios": _ratios(every, self.bands), "errors": _errors(every)}

    def markdown(self, found: Mapping[str, Any]) -> str:
        """Everything that a script prints: the setting, the tables, what did not run and why."""
        versions = ", ".join(f"{name} {value}" for name, value in found["setting"].items())
        tables = [f"**{title}**\n\n{table}" for title, table in self.shown(found).items()]
        not_run = [f"* {kernel}: {why}" for kernel, why in found["not run"].items() if kernel not in LEFT_OUT]
        return "\n\n".join([versions, *tables, *(["Not run:\n" + "\n".join(not_run)] if not_run else [])])


def rows_of_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _measured(every: Iterable[Point]) -> list[str]:
    """The peers that have figures somewhere in these points."""
    return [peer for peer in PEERS if any(peer in point.us for point in every)]


def _times(every: Sequence[Point], columns: Mapping[str, str]) -> str:
    """Microseconds of ours and of each peer, and how many times faster ours is than the fastest of them."""
    points = {(point.problem, point.m): point for point in every if point.problem in columns.values()}
    peers, ms = _measured(points.values()), sorted({m for _, m in points})
    header = (f"M: {' / '.join((f'**{OURS}**', *peers))}", *columns)
    cells = ([_cell(points.get((name, m)), peers) for name in columns.values()] for m in ms)
    return rows_of_table(header, ((str(m), *row) for m, row in zip(ms, cells, strict=True)))


def _cell(point: Point | None, peers: Sequence[str]) -> str:
    if point is None:
        return "-"
    ours, *others = (_microseconds(point.us.get(kernel)) for kernel in (OURS, *peers))
    ratio = point.ratio(peers)
    return " / ".join((f"**{ours}**", *others)) + ("" if ratio is None else f" ({ratio:.2f}x)")


def _microseconds(time: float | None) -> str:
    return "-" if time is None else f"{time:.1f}" if time < 100 else f"{time:.0f}"


def _ratios(every: Sequence[Point], bands: Sequence[tuple[int, int]]) -> str:
    """How many times faster ours is than each peer, and than the fastest at each point: geometric mean and worst."""
    peers = _measured(every)
    against = {f"than {peer}": [peer] for peer in peers} | {"than the fastest of them": list(peers)}
    rows = []
    for low, high in bands:
        band = [point for point in every if low <= point.m <= high]
        rows.append((f"{low} to {high}", *(_mean([point.ratio(some) for point in band]) for some in against.values())))
    return rows_of_table(("M", *against), rows)


def _mean(ratios: Sequence[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.geometric_mean(known):.2f}x (worst {min(known):.2f}x)" if known else "-"


def _errors(every: Sequence[Point]) -> str:
    """The largest mean error of each kernel over all points, in the measure of the conformance kit."""
    kernels = (OURS, *_measured(every))
    errors = {kernel: [p.errors[kernel] for p in every if kernel in p.errors] for kernel in kernels}
    rows = [(kernel, f"{max(found):.1e}") for kernel, found in errors.items() if found]
    return rows_of_table(("kernel", "largest mean error"), rows)
