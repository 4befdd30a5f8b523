"""The `halfbyte` command: its subcommands are imported when they are asked for, so that none pays for another."""

from __future__ import annotations

import importlib
import io
import sys
from typing import Final

import click

from halfbyte.errors import nearest

_COMMANDS: Final = {
    "doctor": "what is installed, found and wrong on this machine",
    "explain": "which kernel runs each layer of a checkpoint (or one problem), and why not the others",
    "run": "generate text from a checkpoint",
    "perplexity": "the loss of a checkpoint on a text",
    "bench": "time the kernels that can run a problem here, correctness first",
}


class _Lazy(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(f"halfbyte.cli.{cmd_name}"), cmd_name)
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}{nearest(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="halfbyte")
def main() -> None:
    """Run FP4 checkpoints (NVFP4, MXFP4) on whatever accelerator is there, and know which kernel really runs."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows what it can
