"""Times of all kernels that can run a problem here, correctness first."""

from halfbyte.benchmark.measure import DENSE, BenchRow, bench

__all__ = ["DENSE", "BenchRow", "bench"]
