"""`halfbyte doctor`."""

from __future__ import annotations

import sys

import click

from halfbyte.cli.failures import NO
from halfbyte.cli.options import common
from halfbyte.cli.output import print_json, print_tables
from halfbyte.doctor import diagnosis_data, diagnosis_tables, examine


@click.command()
@common
def doctor(as_json: bool) -> None:
    """Show this Python, its devices, torch, plugins, kernels and halfbyte's environment variables.

    Imports no torch. Exit code 1 if there is something to mend.
    """
    diagnosis = examine()
    if as_json:
        print_json(diagnosis_data(diagnosis))
    else:
        print_tables(diagnosis_tables(diagnosis))
    if not diagnosis.healthy:
        sys.exit(NO)
