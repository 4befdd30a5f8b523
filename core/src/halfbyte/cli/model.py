"""Loading a model for the commands that run one: its options, the progress bar, the line that says what runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from halfbyte.checkpoints.plan import plan
from halfbyte.cli.output import note, progress_bar
from halfbyte.policies import Policy
from halfbyte.problems import DTYPES
from halfbyte.reports import summary

if TYPE_CHECKING:
    from halfbyte.decisions import Resolution

F = TypeVar("F", bound=Callable[..., Any])


def model_options(function: F) -> F:
    """Add the options that `load` takes."""
    for option in (
        click.option("--dtype", type=click.Choice(list(DTYPES)), help="The compute dtype; default: the checkpoint's."),
        click.option("--device", metavar="D", help="cpu, cuda, cuda:1, xpu; default: the first accelerator here."),
        click.argument("checkpoint", type=click.Path(path_type=Path)),
    ):
        function = option(function)
    return function


def load(checkpoint: Path, device: str | None, dtype: str | None, policy: Policy) -> tuple[Any, Any, list[Resolution]]:
    """Return (model, tokenizer, resolution of every quantized layer), and say on stderr which kernels run."""
    from halfbyte.models.skeleton import require_transformers

    require_transformers()
    from halfbyte.models import load_model, load_tokenizer
    from halfbyte.modules import FP4Experts, FP4Linear

    the_plan = plan(checkpoint, dtype)
    with quiet_libraries():
        tokenizer = load_tokenizer(checkpoint)
        with progress_bar("loading") as progress:
            model = load_model(checkpoint, device=device, dtype=dtype, policy=policy, progress=progress)
    layers = (module for module in model.modules() if isinstance(module, (FP4Linear, FP4Experts)))
    resolutions = [layer.resolution for layer in layers]
    for text in the_plan.notes:
        note(f"halfbyte: {text}")
    note(f"halfbyte: {summary(resolutions)}, on {resolutions[0].machine}")
    return model, tokenizer, resolutions


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' advice off stderr: what is wrong with a checkpoint, halfbyte says itself."""
    from halfbyte.models.skeleton import require_transformers

    require_transformers()
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
