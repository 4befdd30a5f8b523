"""`halfbyte perplexity`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from halfbyte.cli.model import load, model_options
from halfbyte.cli.options import common, demands
from halfbyte.cli.output import print_json, print_tables, progress_bar
from halfbyte.errors import UsageError
from halfbyte.policies import Policy
from halfbyte.reports import Table, kernel_counts


@click.command()
@common
@model_options
@click.option("--text", "text_file", required=True, type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in each window.")
@click.option("--max-windows", type=click.IntRange(min=1), metavar="N", help="Stop after N windows.")
@demands
def perplexity(
    checkpoint: Path,
    device: str | None,
    dtype: str | None,
    text_file: Path,
    window: int,
    max_windows: int | None,
    policy: Policy,
    as_json: bool,
) -> None:
    """Measure the loss of CHECKPOINT on a text: the mean cross-entropy over windows that do not overlap, in nats."""
    from halfbyte.perplexity import perplexity as measure

    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {text_file}: {error}") from error
    if not text.strip():
        raise UsageError(f"the text {text_file} is empty")
    model, tokenizer, resolutions = load(checkpoint, device, dtype, policy)
    with progress_bar("windows") as progress:
        result = measure(model, tokenizer, text, window, max_windows, progress)
    kernels = kernel_counts(resolutions)
    if as_json:
        print_json({**asdict(result), "kernels": kernels})
        return
    rows = [
        ("loss", f"{result.loss:.4f}"),
        ("perplexity", f"{result.perplexity:.3f}"),
        ("windows", str(result.windows)),
        ("tokens", str(result.tokens)),
        ("kernels", ", ".join(f"{kernel} x {count}" for kernel, count in kernels.items())),
    ]
    print_tables([Table("", ("", ""), rows)])
