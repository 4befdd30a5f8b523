"""Where output goes: data on stdout, notes and progress on stderr; nothing is wrapped or coloured off a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import click
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from halfbyte.reports import Table

#: Wider than any line, for output that is not read on a terminal.
_UNWRAPPED: Final = 100_000
#: Between two columns, and the least that is left for the last one.
_GAP: Final = 3
_LAST: Final = 30


def print_json(data: Any) -> None:
    """Print JSON-ready data."""
    click.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables to stdout, leaving out those without rows."""
    for table in tables:
        if not table.rows:
            continue
        if sys.stdout is not None and sys.stdout.isatty():
            console = Console()
            console.print(_render(table if _fits(table, console) else _as_records(table)))
            continue
        plain = Console(width=_UNWRAPPED, color_system=None, force_terminal=False)
        with plain.capture() as capture:
            plain.print(_render(table))
        click.echo("\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n")))


def note(text: str) -> None:
    """Print a line to stderr."""
    click.echo(text, err=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that goes away when it is done; gives a function to call with (done, total)."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _finite(data: Any) -> Any:
    """The same data with null for what JSON has no number for: NaN, infinity."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _fits(table: Table, console: Console) -> bool:
    """Whether all columns but the last fit without wrapping, and leave room for some words in the last."""
    *others, last = (
        max(len(line) for cell in (head, *cells) for line in cell.split("\n"))
        for head, *cells in zip(table.columns, *table.rows, strict=True)
    )
    return sum(width + _GAP for width in others) + min(last, _LAST) <= console.width


def _as_records(table: Table) -> Table:
    """The same with one line for every cell, for a narrow terminal."""
    rows = [
        (column if place else f"[{column}]", cell)
        for row in table.rows
        for place, (column, cell) in enumerate(zip(table.columns, row, strict=True))
    ]
    return Table(table.title, ("", ""), rows)


def _render(table: Table) -> RichTable:
    headed = any(table.columns)
    rich = RichTable(
        title=table.title or None, title_justify="left", box=box.SIMPLE_HEAD, show_header=headed, pad_edge=False
    )
    for column in table.columns:
        rich.add_column(column, overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(cell) for cell in row))
    return rich
