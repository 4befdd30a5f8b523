"""What the benchmarks of kernels share: measuring problems in one run, and keeping the figures."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from figures import LEFT_OUT, Layout
from halfbyte.benchmark import BenchRow, bench
from halfbyte.policies import Policy
from halfbyte.problems import Problem

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


def run(doc: str, problems: Mapping[str, Problem], ms: Sequence[int], layout: Layout) -> list[str]:
    """The command line of both scripts: measure and print the tables, or print those of a file; what was measured."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=problems, help="these problems alone; may be repeated")
    parser.add_argument("--m", default=",".join(map(str, ms)), help="numbers of rows")
    parser.add_argument("--json", type=Path, help="keep the figures here; figures of other problems there stay")
    parser.add_argument("--tables", type=Path, help="measure nothing: print the tables of a file that --json wrote")
    options = parser.parse_args()
    if options.tables:
        print(layout.markdown(json.loads(options.tables.read_text(encoding="utf-8"))))
        return []
    chosen = options.only or list(problems)
    rows = [int(m) for m in options.m.split(",")]
    print(layout.markdown(compare({name: problems[name] for name in chosen}, rows, options.json)))
    return chosen


def compare(problems: Mapping[str, Problem], ms: Sequence[int], file: Path | None) -> dict[str, Any]:
    """Measure every problem at every number of rows; the figures, kept in `file` after each problem."""
    found = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {"points": [], "not run": {}}
    found["setting"] = setting()
    for name, problem in problems.items():
        rows = bench(problem, ms, device="cuda", policy=Policy(deny=",".join(LEFT_OUT)), progress=_tell(name))
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
