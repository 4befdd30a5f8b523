"""Load time and peak memory of `load_model`, beside plain transformers, each in a process of its own (Linux).

    python benchmarks/bench_load.py [CHECKPOINT] [--layers 8] [--hidden 2048]

Without a checkpoint, one with random NVFP4 weights is written to a temporary folder. The peak counts memory of the
process's own (RssAnon), not the pages of the mapped file, above what the imports took.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig

import halfbyte
from halfbyte.checkpoints.plan import plan
from halfbyte.cli.output import print_tables
from halfbyte.problems import packed_bytes
from halfbyte.reports import Table
from halfbyte.units import size_text
from random_llama import write_random_llama

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-python-lm"
WAYS = ("halfbyte, packed", "halfbyte, dequantized", "transformers, dense")


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def load(way: str, checkpoint: Path) -> Any:
    """Load a checkpoint one of the WAYS."""
    if way.startswith("halfbyte"):
        form: Any = way.split(", ")[1]
        return halfbyte.load_model(checkpoint, "cpu", weights=form)
    dequantize = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=dequantize)


def measure(way: str, checkpoint: Path) -> dict[str, Any]:
    """Load in this process; seconds, and bytes above what there was before."""
    load(way, EXAMPLE)  # what is imported on the way is not the model's
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load(way, checkpoint)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    resident = anonymous_bytes() - before
    return {"seconds": seconds, "peak": peak[0] - before, "resident": resident, "model": type(model).__name__}


def random_llama(folder: Path, *, layers: int, hidden: int) -> None:
    """Write an NVFP4 weight-only Llama of that size."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    write_random_llama(folder, config)


def report(checkpoint: Path) -> None:
    """Measure every way in a process of its own and print the table."""
    the_plan = plan(checkpoint)
    layers = [packed_bytes(layer.problem) for layer in the_plan.layers]
    packed, largest = sum(layers) + the_plan.unquantized_bytes, max(layers)
    rows = []
    for way in WAYS:
        child = subprocess.run(
            [sys.executable, __file__, str(checkpoint), "--way", way], check=True, capture_output=True, text=True
        )
        found = json.loads(child.stdout.splitlines()[-1])
        above = (found["peak"] - packed) / largest
        rows.append(
            (
                way,
                f"{found['seconds']:.2f}",
                size_text(found["resident"]),
                size_text(found["peak"]),
                f"{found['peak'] / packed:.2f}x",
                f"{above:+.1f} largest layers",
            )
        )
    title = f"{checkpoint.name}: {size_text(packed)} packed, largest layer {size_text(largest)}"
    columns = ("who", "seconds", "resident", "peak", "peak / packed model", "peak - packed model")
    print_tables([Table(title, columns, rows)])


def main() -> None:
    """Measure one way (`--way`, in a child process) or report on all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.checkpoint)))
    elif options.checkpoint:
        report(options.checkpoint)
    else:
        with tempfile.TemporaryDirectory() as folder:
            random_llama(Path(folder), layers=options.layers, hidden=options.hidden)
            report(Path(folder))


if __name__ == "__main__":
    main()
