"""The options that describe one problem, shared by the commands that take one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from halfbyte.errors import UsageError
from halfbyte.problems import ACTIVATIONS, DTYPES, OPS, ExpertsProblem, LinearProblem, Problem
from halfbyte.schemes import SCHEMES, Scheme

F = TypeVar("F", bound=Callable[..., Any])


def problem_options(function: F) -> F:
    """Add the options whose values `problem_asked` takes."""
    options = (
        click.option("--op", type=click.Choice(OPS), help="The problem: one linear layer, or the experts of one."),
        click.option("--scheme", type=click.Choice(list(SCHEMES)), help="The problem's scheme."),
        click.option("--shape", metavar="NxK", help="Linear: output x input features."),
        click.option("--dtype", type=click.Choice(list(DTYPES)), help="The compute dtype."),
        click.option("--bias", is_flag=True, help="With a bias."),
        click.option("--experts", type=int, metavar="E", help="Experts: how many."),
        click.option("--top-k", type=int, metavar="T", help="Experts: how many each token is routed to."),
        click.option("--hidden", type=int, metavar="H", help="Experts: hidden size."),
        click.option("--intermediate", type=int, metavar="I", help="Experts: intermediate size."),
        click.option(
            "--activation", type=click.Choice(ACTIVATIONS), default="silu", show_default=True, help="Experts."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def problem_asked(
    *,
    op: str | None,
    scheme: str | None,
    shape: str | None,
    dtype: str | None,
    bias: bool,
    experts: int | None,
    top_k: int | None,
    hidden: int | None,
    intermediate: int | None,
    activation: str,
) -> Problem:
    """The problem that command-line options describe; UsageError naming an option that is missing."""
    needed: dict[str, Any] = {"--scheme": scheme}
    own: dict[str, dict[str, Any]] = {
        "linear": {"--shape": shape},
        "experts": {"--experts": experts, "--top-k": top_k, "--hidden": hidden, "--intermediate": intermediate},
    }
    if op is None:
        raise UsageError(f"say which problem: --op {' or --op '.join(OPS)}")
    taken = needed | own.pop(op)
    missing = [name for name, value in taken.items() if value is None]
    strange = [name for others in own.values() for name, value in others.items() if value is not None]
    if strange:
        raise UsageError(f"--op {op} has no {', '.join(strange)}; it takes {', '.join(taken)}")
    if missing:
        raise UsageError(f"--op {op} needs {', '.join(missing)}")
    common_fields: Any = {"scheme": Scheme.parse(str(scheme)), "dtype": dtype or "bfloat16", "bias": bias}
    if op == "experts":
        sizes: Any = {"experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": intermediate}
        if int(sizes["top_k"]) > int(sizes["experts"]):
            raise UsageError(f"--top-k {top_k} is more than --experts {experts}")
        return ExpertsProblem(**common_fields, **sizes, activation=activation)
    match = re.fullmatch(r"(\d+)x(\d+)", str(shape))
    if match is None:
        raise UsageError(f"--shape is {shape!r}; write NxK, such as 4096x14336")
    return LinearProblem(**common_fields, n=int(match[1]), k=int(match[2]))
