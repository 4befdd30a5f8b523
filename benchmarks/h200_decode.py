"""Decoding speed of a Llama-8B-shaped model on one NVIDIA card: FP4 weights in halfbyte beside bf16 weights in cuBLAS.

    python benchmarks/h200_decode.py [--batch 1,16] [--context 512] [--layers 32]

Both are transformers' Llama with the same static cache, one decoding step captured in a CUDA graph; greedy, random
weights, medians of replays, in one run. Memory is what torch has allocated for the model alone.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import halfbyte
from comparison import setting
from figures import rows_of_table
from halfbyte.units import size_text
from random_llama import write_random_llama

STEPS = 32


def config(layers: int) -> LlamaConfig:
    """Llama 3 8B."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


@torch.inference_mode()
def step_milliseconds(model: Any, batch: int, context: int) -> float:
    """The median time of one decoding step of `batch` sequences behind `context` tokens."""
    cache = StaticCache(config=model.config, max_cache_len=context + 4 * STEPS)
    prompt = torch.randint(1000, (batch, context), device=model.device)
    token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

    def step() -> None:
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times: list[float] = []
    for _ in range(STEPS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(make: Any, batches: list[int], context: int) -> tuple[int, list[float]]:
    """Bytes of a model, and its milliseconds for each batch."""
    before = torch.cuda.memory_allocated()
    model = make()
    size = torch.cuda.memory_allocated() - before
    return size, [step_milliseconds(model, batch, context) for batch in batches]


def dense(layers: int) -> Any:
    """The same model with random bf16 weights."""
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config(layers), dtype=torch.bfloat16).eval()


def main() -> None:
    """Load one after the other, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batch.split(",")]
    size, times = measure(lambda: dense(options.layers), batches, options.context)
    rows = [("bf16 (cuBLAS)", size_text(size), *_cells(batches, times, times))]
    for scheme in ("nvfp4", "mxfp4"):
        torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as folder:
            write_random_llama(Path(folder), config(options.layers), scheme=scheme, device="cuda")
            own, found = measure(lambda path=folder: halfbyte.load_model(path, "cuda"), batches, options.context)
        rows.append((f"halfbyte, {scheme}", size_text(own), *_cells(batches, found, times)))
    print(", ".join(f"{name} {value}" for name, value in setting().items()), "\n")
    columns = (f"batch {batch}: tokens/s (step, ratio)" for batch in batches)
    print(rows_of_table(("weights", "memory", *columns), rows))


def _cells(batches: list[int], times: list[float], base: list[float]) -> list[str]:
    return [
        f"{1e3 * batch / time:.0f} ({time:.2f} ms, {other / time:.2f}x)"
        for batch, time, other in zip(batches, times, base, strict=True)
    ]


if __name__ == "__main__":
    main()
