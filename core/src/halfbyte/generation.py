"""Text from a model, piece by piece: greedy or sampled, with a KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from halfbyte.errors import BrokenModelError, UsageError

#: Tokens before the new ones that are decoded with them: some tokenizers drop the space before the first token.
_CONTEXT: Final = 6
#: What decoding gives for bytes that are no whole UTF-8 character yet.
_UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces of text that are final; joined, they are the whole of it.

    Greedy at temperature 0; otherwise sampled from all tokens, reproducibly for one `seed`. Stops after
    `max_new_tokens` tokens or at an end token of the model's generation config, which is not shown.
    UsageError for a prompt without tokens and for values outside their range; BrokenModelError, while iterating, if
    the model's logits are NaN.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature is {temperature}; it must be finite and not negative")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not valid Unicode: {error}") from error
    prompt_ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if not prompt_ids:
        raise UsageError("the prompt has no tokens; write at least one character")
    tokens = _tokens(model, prompt_ids, max_new_tokens, temperature, _generator(seed))
    return _pieces(tokenizer, prompt_ids, tokens)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()  # on the CPU, so that one seed gives one text on every device
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _tokens(
    model: Any, prompt_ids: list[int], max_new_tokens: int, temperature: float, generator: torch.Generator
) -> Iterator[int]:
    ends = _end_tokens(model)
    ids, cache = prompt_ids, None
    for _ in range(max_new_tokens):
        with torch.no_grad():
            inputs = torch.tensor([ids], device=model.device)
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = _choose(output.logits[0, -1], temperature, generator)
        if token in ends:
            return
        yield token
        ids, cache = [token], output.past_key_values


def _end_tokens(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    best = logits.argmax()  # NaN counts as the largest number
    if logits[best].isnan():
        raise BrokenModelError(
            "the model's logits are NaN; `halfbyte perplexity` on other kernels tells whose fault it is"
        )
    if temperature == 0:
        return int(best)
    weights = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))


def _pieces(tokenizer: Any, prompt_ids: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """Decode tokens as they come, holding back those whose text may still change."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    context, pending = prompt_ids[-_CONTEXT:], list[int]()
    for token in tokens:
        pending.append(token)
        text = decode([*context, *pending])
        if text.endswith(_UNFINISHED):
            continue
        piece = text[len(decode(context)) :]
        if piece:
            yield piece
        context, pending = [*context, *pending][-_CONTEXT:], []
    if pending:
        rest = decode([*context, *pending])[len(decode(context)) :]
        if rest:
            yield rest
