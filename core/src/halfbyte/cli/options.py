"""Options that the commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from halfbyte.cli.failures import reported
from halfbyte.policies import Activations, Policy, Weights
from halfbyte.specs import Fidelity

F = TypeVar("F", bound=Callable[..., Any])


def common(function: F) -> F:
    """--json and --debug, and every error of ours as one message and an exit code instead of a traceback."""

    @functools.wraps(function)
    def guarded(*args: Any, debug: bool, **kwargs: Any) -> Any:
        with reported(debug=debug):
            return function(*args, **kwargs)

    decorated: Any = guarded
    decorated = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")(decorated)
    result: F = click.option("--debug", is_flag=True, help="Show tracebacks.")(decorated)
    return result


def demands(function: F) -> F:
    """The options that make up a policy, handed on as `policy`."""

    @functools.wraps(function)
    def with_policy(
        *args: Any,
        require: str,
        prefer: str,
        deny: str,
        fidelity: str | None,
        activations: Activations | None,
        weights: Weights | None,
        **kwargs: Any,
    ) -> Any:
        policy = Policy(
            require=require, prefer=prefer, deny=deny, fidelity=fidelity, activations=activations, weights=weights
        )
        return function(*args, policy=policy, **kwargs)

    options = (
        click.option("--require", default="", metavar="KERNELS", help="One of these must run, or it is an error."),
        click.option("--prefer", default="", metavar="KERNELS", help="Try these first, in this order."),
        click.option("--deny", default="", metavar="KERNELS", help="These must not run."),
        click.option("--fidelity", type=click.Choice([f.value for f in Fidelity]), help="The worst fidelity allowed."),
        click.option(
            "--activation-policy",
            "activations",
            type=click.Choice(get_args(Activations)),
            help="Whether a weight-only checkpoint may quantize activations.",
        ),
        click.option("--weights", type=click.Choice(get_args(Weights)), help="The form that weights are kept in."),
    )
    decorated: Any = with_policy
    for option in reversed(options):
        decorated = option(decorated)
    result: F = decorated
    return result
