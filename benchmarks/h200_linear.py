"""Weight-only linear layers on one NVIDIA card: marlin.cuda beside vLLM's Marlin, humming and cuBLAS on bf16 weights.

    python benchmarks/h200_linear.py [--only nvfp4-4096x4096] [--m 1,16,256] [--json linear.json]
    python benchmarks/h200_linear.py --tables linear.json

One run, medians of CUDA-graph replays over copies of the weights that exceed the L2 cache; every result is first
compared with a float64 oracle, and what is wrong is not timed. Peers that are not installed are left out, and named.
"""

from itertools import product

import torch

from comparison import run
from figures import OURS, Layout, rows_of_table
from halfbyte import FP4Linear
from halfbyte.conformance import data, oracle
from halfbyte.conformance.tolerances import errors
from halfbyte.policies import Policy
from halfbyte.problems import LinearProblem
from halfbyte.schemes import SCHEMES

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 28672))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = ("nvfp4", "mxfp4")
PROBLEMS = {
    f"{fmt}-{n}x{k}": LinearProblem(scheme=SCHEMES[f"{fmt}-w4a16"], n=n, k=k)
    for fmt, (n, k) in product(FORMATS, SHAPES)
}
LAYOUT = Layout(
    ((1, 16), (32, 128), (256, 4096)),
    {fmt: {f"{n}x{k}": f"{fmt}-{n}x{k}" for n, k in SHAPES} for fmt in FORMATS},
)


@torch.inference_mode()
def outliers(problem: LinearProblem, m: int) -> float:
    """The mean error of our kernel where a few channels of x are 50 times larger than the others."""
    weights = data.linear_weights(problem.scheme, problem.n, problem.k, dtype=torch.bfloat16)
    layer = FP4Linear(weights, device="cuda", policy=Policy(require=OURS))
    x = data.activations(m, problem.k, torch.bfloat16, kind="outliers")
    expected = oracle.linear(x.cuda(), type(weights)(scheme=weights.scheme, matrix=weights.matrix.to("cuda")), None)
    return errors(layer(x.cuda()), expected).mean


def main() -> None:
    """Measure and print the tables, or print those of a file."""
    chosen = run(__doc__ or "", PROBLEMS, ROWS, LAYOUT)
    found = [(name, *(f"{outliers(PROBLEMS[name], m):.1e}" for m in (1, 16, 256))) for name in chosen]
    if found:
        print("\nErrors of marlin.cuda with outlier channels:\n")
        print(rows_of_table(("problem", "M = 1", "M = 16", "M = 256"), found))


if __name__ == "__main__":
    main()
