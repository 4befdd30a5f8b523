"""Tokens per second of halfbyte and of plain transformers on the same checkpoint, taking turns in one run.

    python benchmarks/bench_run.py [CHECKPOINT] [--tokens 64] [--rounds 5] [--dtype bfloat16] [--device cpu]

Plain transformers loads the checkpoint with compressed-tensors' decompression into dense weights, and does not quantize
activations; halfbyte runs the scheme that the checkpoint asks for.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
from transformers.utils import logging

import halfbyte
from halfbyte.cli.output import print_tables
from halfbyte.generation import stream
from halfbyte.reports import Table

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-python-lm"
PROMPT = "class Node:\n    def __init__(self, "


def timed(generate: Callable[[], int]) -> float:
    """Tokens per second of one generation."""
    start = time.perf_counter()
    tokens = generate()
    return tokens / (time.perf_counter() - start)


def ours(model: Any, tokenizer: Any, tokens: int) -> int:
    """Generate with halfbyte's own loop; the number of tokens that came."""
    text = "".join(stream(model, tokenizer, PROMPT, tokens))
    return len(tokenizer(text)["input_ids"])


def theirs(model: Any, tokenizer: Any, tokens: int) -> int:
    """Generate with transformers; the number of tokens that came."""
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return int(output.shape[1] - inputs["input_ids"].shape[1])


def main() -> None:
    """Load both ways for every form of our weights, generate in turn, print the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    dense = AutoModelForCausalLM.from_pretrained(
        options.checkpoint,
        dtype=getattr(torch, options.dtype),
        quantization_config=CompressedTensorsConfig(dequantize=True),
    ).to(options.device)
    contenders: dict[str, Callable[[], int]] = {
        "transformers (dense)": lambda: theirs(dense, tokenizer, options.tokens)
    }
    for form in ("dequantized", "packed"):
        model = halfbyte.load_model(options.checkpoint, options.device, options.dtype, weights=form)
        contenders[f"halfbyte ({form})"] = lambda model=model: ours(model, tokenizer, options.tokens)  # type: ignore[misc]
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds + 1):
        for name, generate in contenders.items():
            rates[name].append(timed(generate))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    peer = medians["transformers (dense)"]
    rows = [(name, f"{median:.1f}", f"{median / peer:.2f}x") for name, median in medians.items()]
    title = f"{options.checkpoint.name}, {options.dtype} on {options.device}, {options.tokens} tokens"
    print_tables([Table(title, ("who", "tokens/s (median)", "of transformers"), rows)])


if __name__ == "__main__":
    main()
