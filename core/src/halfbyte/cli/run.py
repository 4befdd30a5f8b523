"""`halfbyte run`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import click

from halfbyte.cli.model import load, model_options
from halfbyte.cli.options import common, demands
from halfbyte.cli.output import note, print_json
from halfbyte.policies import Policy
from halfbyte.reports import kernel_counts


@click.command()
@common
@model_options
@click.option("--prompt", required=True, metavar="TEXT", help="What the text begins with.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, metavar="N")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes sampling repeatable.")
@demands
def run(
    checkpoint: Path,
    device: str | None,
    dtype: str | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    policy: Policy,
    as_json: bool,
) -> None:
    """Generate text from CHECKPOINT: stdout has the prompt and its continuation, stderr says which kernels run."""
    from halfbyte.generation import stream
    from halfbyte.perplexity import position_limit

    model, tokenizer, resolutions = load(checkpoint, device, dtype, policy)
    pieces = stream(model, tokenizer, prompt, max_new_tokens, temperature, seed)
    limit, asked = position_limit(model), len(tokenizer(prompt)["input_ids"]) + max_new_tokens
    if limit is not None and asked > limit:
        note(f"halfbyte: this may reach {asked} tokens; the model was made for {limit} and gets worse beyond")
    if as_json:
        print_json({"prompt": prompt, "text": "".join(pieces), "kernels": kernel_counts(resolutions)})
        return
    for piece in chain([prompt], pieces, ["\n"]):
        click.echo(piece, nl=False)
