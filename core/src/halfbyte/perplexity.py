"""Perplexity of a language model over a text, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.errors import BrokenModelError, UsageError


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a text: the mean over windows of each window's mean cross-entropy, in nats."""

    loss: float
    #: exp(loss)
    perplexity: float
    windows: int
    #: Predictions made: window - 1 in each window.
    tokens: int


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    window: int = 512,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Return the perplexity of a transformers model over `text`.

    The text is tokenized once and cut into windows of `window` tokens that do not overlap; the rest is dropped. Each
    window is seen without its predecessors and gives `window` - 1 predictions, from logits in float32.
    `progress(done, total)` is called after each window. UsageError for a text shorter than one window and for a window
    longer than the model was made for; BrokenModelError for a loss that is NaN.
    """
    if window < 2:
        raise UsageError(f"window is {window}; it must be at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"max_windows is {max_windows}; it must be at least 1")
    limit = position_limit(model)
    if limit is not None and window > limit:
        raise UsageError(f"window is {window}; the model was made for at most {limit} tokens")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    windows = ids[: len(ids) // window * window].view(-1, window)[:max_windows]
    total = len(windows)
    if not total:
        raise UsageError(f"the text has {len(ids)} tokens; one window needs {window}")
    losses = []
    for done, tokens in enumerate(windows, start=1):
        losses.append(_mean_loss(model, tokens.to(model.device)))
        if progress is not None:
            progress(done, total)
    loss = math.fsum(losses) / total
    if math.isnan(loss):
        raise BrokenModelError("the loss is NaN: the weights, or the kernels that run them, are broken")
    # A model that is broken badly enough overflows: that is an answer too.
    return Perplexity(loss, math.exp(loss) if loss < 700 else math.inf, windows=total, tokens=total * (window - 1))


def position_limit(model: Any) -> int | None:
    """The number of tokens that a transformers model was made for, if its configuration says so."""
    config = getattr(model, "config", None)
    limit = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@torch.no_grad()
def _mean_loss(model: Any, tokens: Tensor) -> float:
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits.float(), tokens[1:]).item()
