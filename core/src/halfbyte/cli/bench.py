"""`halfbyte bench`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli.failures import NO
from halfbyte.cli.options import common, demands
from halfbyte.cli.output import note, print_json, print_tables
from halfbyte.cli.problem import problem_asked, problem_options
from halfbyte.errors import UsageError
from halfbyte.policies import Policy
from halfbyte.problems import Problem
from halfbyte.reports import Table

if TYPE_CHECKING:
    from halfbyte.benchmark import BenchRow


@click.command()
@common
@problem_options
@click.option("--m", "rows", default="1,16,128", show_default=True, metavar="M,M,...", help="Rows of x (tokens).")
@click.option("--device", metavar="D", help="cpu, cuda, cuda:1, xpu; default: the first accelerator here.")
@demands
def bench(rows: str, device: str | None, policy: Policy, as_json: bool, **asked: Any) -> None:
    """Time every kernel that can run a problem on this machine, beside torch on dequantized weights.

    Each kernel is first compared with a float64 oracle; one that is wrong is not timed. Exit code 1 if one is wrong or
    fails, or if nothing can run.
    """
    problem, numbers = problem_asked(**asked), _numbers(rows)
    from halfbyte.benchmark import bench as measure

    results = measure(problem, numbers, device=device, policy=policy, progress=lambda name: note(f"halfbyte: {name}"))
    if as_json:
        print_json({"problem": problem.to_dict(), "rows": [_row_data(row) for row in results]})
    else:
        print_tables(_tables(problem, results))
    ran = [row for row in results if row.m is not None and row.state is not None]
    if not ran or not all(row.ok for row in ran) or any(row.failure for row in results):
        sys.exit(NO)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"--m is {text!r}; write numbers of rows with commas, such as 1,16,128") from None


def _row_data(row: BenchRow) -> dict[str, Any]:
    return {**asdict(row), "refusals": [refusal.to_dict() for refusal in row.refusals]}


def _tables(problem: Problem, results: list[BenchRow]) -> list[Table]:
    measured = [
        (
            str(row.m),
            row.kernel,
            _number(row.error, ".1e"),
            _number(row.tolerance, ".1e"),
            row.failure or ("ok" if row.ok else "WRONG"),
            _number(row.median_us, ".1f"),
            _number(row.ratio, ".2f", "x"),
        )
        for row in results
        if row.m is not None
    ]
    others = [
        (row.kernel, str(row.state), row.failure or "\n".join(map(str, row.refusals)))
        for row in results
        if row.m is None
    ]
    columns = ("M", "kernel", "error", "allowed", "result", "median us", "of torch's speed")
    return [
        Table(str(problem), columns, measured),
        Table("not run", ("kernel", "state", "why not"), others),
    ]


def _number(value: float | None, how: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{how}}{unit}"
