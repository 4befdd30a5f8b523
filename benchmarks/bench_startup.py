"""Start-up time of the commands that need no torch, beside an empty Python and `import torch`, in one run.

python benchmarks/bench_startup.py [--runs 10]
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from halfbyte.cli.output import print_tables
from halfbyte.reports import Table

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-python-lm"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "halfbyte doctor": ["-m", "halfbyte", "doctor", "--json"],
    "halfbyte explain CHECKPOINT": ["-m", "halfbyte", "explain", str(EXAMPLE), "--json"],
    "python -c 'import torch'": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=False, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Run every command in turn, several times, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    # The first round fills the file cache.
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    empty = medians["python -c pass"]
    rows = [
        (name, f"{median:.3f}", f"{min(times[name][1:]):.3f}", f"{max(times[name][1:]):.3f}", f"{median / empty:.1f}x")
        for name, median in medians.items()
    ]
    print_tables([Table(f"start-up, {runs} runs", ("command", "median s", "min", "max", "of empty Python"), rows)])


if __name__ == "__main__":
    main()
