"""What the benchmarks of kernels share: measuring problems in one run, keeping the figures, making tables of them."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from halfbyte.benchmark import DENSE, BenchRow, bench
from halfbyte.policies import Policy
from halfbyte.problems import Problem

OURS = "marlin.cuda"
#: humming with its own schedule; see peer_humming.py.
HUMMING = "humming"
PEERS = ("marlin.vllm", "marlin.humming", HUMMING, "flashinfer.cutile", DENSE)
#: Built in, and no peers: they dequantize.
_LEFT_OUT = "reference,dequantized"
_DISTRIBUTIONS = (
    "torch",
    "halfbyte",
    "halfbyte-cuda-marlin",
    "cuda-bindings",
    "vllm",
    "humming-kernels",
    "halfbyte-cuda-blackwell",
    "flashinfer-python",
    "cuda-tile",
    "nvidia-cuda-tileiras",
)


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


def arguments(doc: str, ms: Sequence[int], problems: Sequence[str]) -> argparse.Namespace:
    """The options of both scripts: which problems and rows, and where the figures go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=problems, help="these problems alone; may be repeated")
    parser.add_argument("--m", default=",".join(map(str, ms)), help="numbers of rows")
    parser.add_argument("--json", type=Path, help="keep the figures here; figures of other problems there stay")
    parser.add_argument("--tables", type=Path, help="measure nothing: print the tables of a file that --json wrote")
    options = parser.parse_args()
    options.only, options.m = options.only or problems, [int(m) for m in options.m.split(",")]
    return options


def compare(problems: Mapping[str, Problem], ms: Sequence[int], file: Path | None) -> dict[str, Any]:
    """Measure every problem at every number of rows; the figures, kept in `file` after each problem."""
    found = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {"points": [], "not run": {}}
    found["setting"] = setting()
    for name, problem in problems.items():
        rows = bench(problem, ms, device="cuda", policy=Policy(deny=_LEFT_OUT), progress=_tell(name))
        found["points"] = [point for point in found["points"] if point["problem"] != name]
        found["points"] += [_point(name, m, [row for row in rows if row.m == m]) for m in ms]
        found["not run"] |= {row.kernel: _why(row) for row in rows if row.m is None or row.failure}
        if file:
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        torch.cuda.empty_cache()
    return found


def setting() -> dict[str, str]:
    """The card and the versions of all that took part."""
    found = {"card": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def points(found: dict[str, Any]) -> list[Point]:
    """The figures as points."""
    return [Point(**point) for point in found["points"]]


def markdown(found: dict[str, Any], bands: Sequence[tuple[int, int]]) -> str:
    """Everything as markdown: the setting, geometric means by band of rows, and a table for each problem.

    Peers that were measured nowhere have no column.
    """
    every = points(found)
    peers = [peer for peer in PEERS if any(peer in point.us for point in every)]
    versions = ", ".join(f"{name} {value}" for name, value in found["setting"].items())
    names = dict.fromkeys(point.problem for point in every)
    tables = [f"**{name}**\n\n{_table([point for point in every if point.problem == name], peers)}" for name in names]
    not_run = [f"* {kernel}: {why}" for kernel, why in found["not run"].items() if kernel not in _LEFT_OUT]
    return "\n\n".join(
        [versions, _means(every, bands, peers), *tables, *(["Not run:\n" + "\n".join(not_run)] if not_run else [])]
    )


def rows_of_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _means(every: Sequence[Point], bands: Sequence[tuple[int, int]], peers: Sequence[str]) -> str:
    """How much faster than each peer, and than the fastest of all at each point: geometric mean and worst."""
    rows = []
    for low, high in bands:
        band = [point for point in every if low <= point.m <= high]
        against = [[peer] for peer in peers] + [list(peers)]
        rows.append((f"M = {low} to {high}", *(_mean([point.ratio(some) for point in band]) for some in against)))
    return rows_of_table(("rows", *(f"against {peer}" for peer in peers), "against the fastest"), rows)


def _mean(ratios: Sequence[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.geometric_mean(known):.2f}x (worst {min(known):.2f}x)" if known else "-"


def _table(every: Sequence[Point], peers: Sequence[str]) -> str:
    def cell(point: Point, kernel: str) -> str:
        return f"{point.us[kernel]:.1f}" if kernel in point.us else "-"

    kernels = [OURS, *peers]
    compared = [kernel for kernel in kernels if kernel != DENSE]
    header = ("M", *kernels, "fastest peer / ours", *(f"error of {kernel}" for kernel in compared))
    rows = []
    for point in every:
        ratio = point.ratio()
        errors = (f"{point.errors[kernel]:.1e}" if kernel in point.errors else "-" for kernel in compared)
        times = (cell(point, kernel) for kernel in kernels)
        rows.append((str(point.m), *times, "-" if ratio is None else f"{ratio:.2f}x", *errors))
    return rows_of_table(header, rows)


def _point(name: str, m: int, rows: Sequence[BenchRow]) -> dict[str, Any]:
    us = {row.kernel: round(row.median_us, 2) for row in rows if row.median_us is not None}
    return {
        "problem": name,
        "m": m,
        "us": us,
        "errors": {row.kernel: row.error for row in rows if row.error is not None},
    }


def _why(row: BenchRow) -> str:
    return row.failure or "; ".join(map(str, row.refusals))


def _tell(name: str) -> Callable[[str], None]:
    return lambda kernel: print(f"{name}: {kernel}", flush=True)
