"""humming-kernels with its own schedule, as its users get it: a peer's times, added to a file of h200_linear.py.

    python benchmarks/peer_humming.py linear.json [--only nvfp4-4096x4096] [--m 1,16,256]

marlin.humming keeps every sum in one CTA, so that results do not change from run to run. humming itself splits K and
adds parts up in 16 bits, which is faster for small matrices and less precise. It is timed whatever its error is.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from figures import HUMMING
from h200_linear import PROBLEMS, ROWS
from halfbyte import FP4Linear
from halfbyte.benchmark.timing import copies_needed, median_microseconds
from halfbyte.conformance import data, oracle
from halfbyte.conformance.tolerances import errors
from halfbyte.policies import Policy
from halfbyte.problems import LinearProblem
from halfbyte.weights import LinearWeights
from halfbyte_cuda_marlin.humming import launching, schedule
from halfbyte_cuda_marlin.humming.library import library
from halfbyte_cuda_marlin.humming.packing import arguments


def use_its_own_schedule() -> None:
    """Make marlin.humming take what humming chooses for every number of rows, stream-K and its locks included."""
    locks = torch.zeros(1 << 15, dtype=torch.int32, device="cuda")

    def ranges(ends: tuple[int, ...], choose: Any) -> list[list[Any]]:
        configs = [choose(end) for end in ends]
        known = [list(known) for known in zip((0, *ends[:-1]), ends, configs, strict=True)]
        return [*known, [ends[-1], 1 << 30, configs[-1]]]

    def launch(gemm: Any, x: Tensor, packed: Any, starts: Any, as_rows: int) -> Tensor:
        kernels, given = launching._kernels(gemm, x.device), arguments(packed, gemm.format)
        return library().launch(
            configs=kernels, inputs=x, **given, expert_layout=starts, valid_shape_m=as_rows, locks=locks
        )

    replaced: Any = launching
    schedule.ranges, replaced._launch, replaced._HOPPER = ranges, launch, None
    launching._kernels.cache_clear()


@torch.inference_mode()
def measure(problem: LinearProblem, ms: list[int]) -> dict[int, tuple[float, float]]:
    """(microseconds, mean error) for every number of rows."""
    card = torch.device("cuda")
    weights = data.linear_weights(problem.scheme, problem.n, problem.k, dtype=torch.bfloat16)
    there = LinearWeights(scheme=weights.scheme, matrix=weights.matrix.to(card))
    layer = FP4Linear(there, device=card, policy=Policy(require="marlin.humming"))
    size = sum(buffer.nbytes for buffer in layer.buffers())
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies_needed(size, card) - 1))]
    found = {}
    for m in ms:
        x = data.activations(m, problem.k, torch.bfloat16).to(card)
        some = x[:128]
        error = errors(layer(x)[:128], oracle.linear(some, there, None)).mean
        found[m] = (median_microseconds([lambda own=own, x=x: own(x) for own in layers], card), error)  # type: ignore[misc]
    return found


def main() -> None:
    """Measure the problems that the file has, and write it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", action="append", choices=PROBLEMS)
    parser.add_argument("--m", default=",".join(map(str, ROWS)))
    options = parser.parse_args()
    use_its_own_schedule()
    found = json.loads(options.file.read_text(encoding="utf-8"))
    ms = [int(m) for m in options.m.split(",")]
    for name in options.only or dict.fromkeys(point["problem"] for point in found["points"]):
        measured = measure(PROBLEMS[name], ms)
        for point in found["points"]:
            if point["problem"] == name and point["m"] in measured:
                point["us"][HUMMING], point["errors"][HUMMING] = measured[point["m"]]
        options.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{name}: {measured}", flush=True)


if __name__ == "__main__":
    main()
