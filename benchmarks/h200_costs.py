"""What a call costs the host, and what preparing a layer costs the card, on one NVIDIA card.

    python benchmarks/h200_costs.py

Host: one eager call with one row, 1024 x 1024, without a graph, the card idle between batches of calls, beside
torch.nn.functional.linear. Preparation, with the kernel chosen beforehand: packed bytes of the checkpoint per second,
of `prepare` alone and of making a layer, and the largest memory beyond the weights that came and the weights that stay,
in copies of the layer.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from comparison import setting
from figures import OURS, PEERS, rows_of_table
from halfbyte import FP4Experts, FP4Linear
from halfbyte.conformance import data
from halfbyte.decisions import machine_here, resolve
from halfbyte.errors import HalfbyteError
from halfbyte.packing import choose, pack_experts, pack_linear
from halfbyte.policies import Policy
from halfbyte.problems import LinearProblem
from halfbyte.schemes import MXFP4_W4A16, NVFP4_W4A16
from halfbyte.weights import ExpertsWeights, LinearWeights

CARD = torch.device("cuda")
CALLS = 200
SHAPES = ((4096, 4096), (28672, 4096), (8192, 28672))


def kernels() -> list[str]:
    """Ours and the peers that can run here."""
    machine = machine_here("cuda")
    resolution = resolve(LinearProblem(scheme=NVFP4_W4A16, n=1024, k=1024), machine)
    able = {candidate.spec.id for candidate in resolution.candidates if not candidate.refusals}
    return [kernel for kernel in (OURS, *PEERS) if kernel in able]


def host_microseconds(call: Callable[[], object]) -> float:
    """The median, over batches, of the host's time for one call; a batch is small enough for the launch queue."""
    times = []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter_ns() - start) / 1e3 / CALLS)
    return statistics.median(times)


@torch.inference_mode()
def host_table() -> str:
    """Eager calls of every kernel beside F.linear."""
    weights = data.linear_weights(NVFP4_W4A16, 1024, 1024, dtype=torch.bfloat16)
    x, dense = torch.randn(1, 1024, device="cuda").bfloat16(), torch.randn(1024, 1024, device="cuda").bfloat16()
    base = host_microseconds(lambda: F.linear(x, dense))
    rows = [("torch.nn.functional.linear", f"{base:.1f}", "1.00x")]
    for kernel in kernels():
        layer = FP4Linear(weights, device="cuda", policy=Policy(require=kernel))
        found = host_microseconds(lambda layer=layer: layer(x))  # type: ignore[misc]
        rows.append((f"FP4Linear, {kernel}", f"{found:.1f}", f"{found / base:.2f}x"))
    return rows_of_table(("eager call, M = 1", "us of the host", "of F.linear"), rows)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a call, and the largest memory beyond what was there before and what stays, in bytes."""

    seconds: float
    extra: int


def cost(make: Callable[[], object]) -> Cost:
    """The median time and the peak of memory of five calls, after one that compiles."""
    make()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        made = make()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del made
    return Cost(statistics.median(times), peak - kept)


def makers(weights: LinearWeights | ExpertsWeights, policy: Policy) -> tuple[Callable[[], object], ...]:
    """What prepares the weights alone, and what makes a layer of them; the kernel is chosen already."""
    if isinstance(weights, LinearWeights):
        linear = weights.problem(torch.bfloat16)
        resolution = resolve(linear, machine_here("cuda"), policy)
        choice = choose(linear, CARD, resolution=resolution)
        return (
            lambda: pack_linear(choice, weights, linear, CARD),
            lambda: FP4Linear(weights, device=CARD, resolution=resolution),
        )
    experts = weights.problem(torch.bfloat16, top_k=4, activation="silu")
    resolution = resolve(experts, machine_here("cuda"), policy)
    choice = choose(experts, CARD, resolution=resolution)
    return (
        lambda: pack_experts(choice, weights, experts, CARD),
        lambda: FP4Experts(weights, top_k=4, activation="silu", device=CARD, resolution=resolution),
    )


def prepare_table() -> str:
    """Preparation of linear layers and of experts by every kernel."""
    layers: dict[str, LinearWeights | ExpertsWeights] = {}
    for n, k in SHAPES:
        linear = data.linear_weights(NVFP4_W4A16, n, k, dtype=torch.bfloat16)
        layers[f"nvfp4-{n}x{k}"] = replace(linear, matrix=linear.matrix.to(CARD))
    experts = data.experts_weights(MXFP4_W4A16, 32, 2880, 2880, dtype=torch.bfloat16)
    gate, up, down = (matrix.to(CARD) for matrix in experts.matrices)
    layers["mxfp4-32-experts-2880x2880"] = replace(experts, gate=gate, up=up, down=down)
    rows: list[tuple[str, ...]] = []
    for name, weights in layers.items():
        matrices = (weights.matrix,) if isinstance(weights, LinearWeights) else weights.matrices
        size = sum(matrix.packed.nbytes + matrix.scales.nbytes for matrix in matrices)
        for kernel in kernels():
            try:
                alone, whole = (cost(make) for make in makers(weights, Policy(require=kernel)))
            except HalfbyteError as error:
                rows.append((name, kernel, str(error).splitlines()[0], "-", "-"))
                continue
            speeds = (f"{size / found.seconds / 1e9:.1f}" for found in (alone, whole))
            rows.append((name, kernel, *speeds, f"{whole.extra / size:.2f}"))
    return rows_of_table(("layer", "kernel", "prepare, GB/s", "layer, GB/s", "extra copies at the peak"), rows)


def main() -> None:
    """Print both tables."""
    print(", ".join(f"{name} {value}" for name, value in setting().items()), "\n")
    print(host_table(), "\n")
    print(prepare_table())


if __name__ == "__main__":
    main()
