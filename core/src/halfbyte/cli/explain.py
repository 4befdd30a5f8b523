"""`halfbyte explain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from halfbyte.checkpoints.plan import plan
from halfbyte.cli.failures import NO
from halfbyte.cli.options import common, demands
from halfbyte.cli.output import print_json, print_tables
from halfbyte.cli.problem import problem_asked, problem_options
from halfbyte.decisions import machine_here, resolve
from halfbyte.errors import UsageError
from halfbyte.groups import resolve_model
from halfbyte.machines import Machine, describe
from halfbyte.plugins import available_kernels
from halfbyte.policies import Policy
from halfbyte.probe import installed_packages
from halfbyte.reports import model_data, model_tables, resolution_data, resolution_tables


@click.command()
@common
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--machine", "machine_name", metavar="NAME", help="A described machine, such as sm_100, or a TOML file.")
@click.option("--installed", is_flag=True, help="For a described machine: count only the libraries installed here.")
@problem_options
@click.option("--layers", "every_layer", is_flag=True, help="Name every layer (always so off a terminal).")
@demands
def explain(
    checkpoint: Path | None,
    machine_name: str | None,
    installed: bool,
    every_layer: bool,
    policy: Policy,
    as_json: bool,
    **asked: Any,
) -> None:
    """Show which kernel runs each layer of CHECKPOINT, every candidate with its refusals, and the memory.

    Needs no torch: it reads config.json, the safetensors headers and the scalar global scales only. With --op, explains
    one problem. Exit code 1 if nothing can run a layer.
    """
    machine = _machine(machine_name, installed=installed)
    if checkpoint is not None:
        _only_dtype(asked)
        model = resolve_model(plan(checkpoint, asked["dtype"]), machine, policy)
        show_all = every_layer or not sys.stdout.isatty()
        print_json(model_data(model)) if as_json else print_tables(model_tables(model, every_layer=show_all))
        answered = model.fits and all(group.resolution.selected for group in model.groups)
    else:
        if asked["op"] is None:
            raise UsageError("give a checkpoint folder, or one problem with --op")
        resolution = resolve(problem_asked(**asked), machine, policy)
        print_json(resolution_data(resolution)) if as_json else print_tables(resolution_tables(resolution))
        answered = resolution.selected is not None
    if not answered:
        sys.exit(NO)


def _only_dtype(asked: dict[str, Any]) -> None:
    """UsageError for an option that describes one problem."""
    context = click.get_current_context()
    for name in asked:
        if name != "dtype" and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UsageError(f"give a checkpoint or --op, not both: --{name.replace('_', '-')} is about one problem")


def _machine(name: str | None, *, installed: bool) -> Machine:
    if name is None:
        if installed:
            raise UsageError("--installed is about a machine described with --machine")
        return machine_here()
    machine = describe(name)
    return machine.with_packages(installed_packages(available_kernels())) if installed else machine
