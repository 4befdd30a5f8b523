"""Level 2: compile the CuTe DSL kernels that our kernels select, for a card that is not there.

    python -m cuda_blackwell.cross_compile sm_100a      (in tests/; sm_103a, sm_120a and sm_121a too)

Needs nvidia-cutlass-dsl with its libraries for CUDA 13, and no card. FlashInfer's own Python code chooses the tactic
for every number of rows and builds the kernel; the PTX must hold block-scaled MMA. Exit code 1 if one does not.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROWS = (1, 16, 64, 512, 4096)
SIZES = ((4096, 4096), (28672, 4096))
MULTIPROCESSORS = 148  # of a B200: tactics follow from it
#: PTX of a product of 4-bit numbers with block scales: SM10x's tensor memory, SM12x's registers.
BLOCK_SCALED = re.compile(r"(?:tcgen05\.mma|mma\.sync)[\w.:]*(?:kind::mxf4\w*[\w.:]*|block_scale[\w.:]*)+")


def main(arch: str) -> int:
    """Compile for `arch`, print one line for each kernel; 0 if all of them have block-scaled MMA."""
    with tempfile.TemporaryDirectory() as folder:
        names = {"CUTE_DSL_ARCH": arch, "CUTE_DSL_KEEP_PTX": "1", "CUTE_DSL_DUMP_DIR": folder}
        os.environ |= names | {"FLASHINFER_CUTE_DSL_DISABLE_CACHE": "1"}
        found = list(_compiled(int(arch[3:-1]), Path(folder)))
    for kernel, seconds, instructions in found:
        print(f"{arch} {kernel}: {seconds:.1f} s, {', '.join(sorted(instructions)) or 'no block-scaled MMA'}")  # noqa: T201
    return 0 if found and all(instructions for *_, instructions in found) else 1


def _compiled(capability: int, folder: Path) -> Iterator[tuple[str, float, set[str]]]:
    """(kernel, seconds, instructions) for every kernel that some number of rows selects."""
    from flashinfer.gemm import gemm_base

    from cuda_blackwell.flashinfer_emulator.patches import emulated

    real = {name: getattr(gemm_base, name) for name in ("_cute_dsl_gemm_fp4_runner", "_b12x_gemm_fp4_runner")}
    seen: dict[str, tuple[float, set[str]]] = {}

    def compiling(_cache: Any, key: Any, make: Callable[[], Any], **named: Any) -> tuple[Callable[..., None], None]:
        if str(key) not in seen:
            seen[str(key)] = _compile(make(), named, folder)
        return lambda *_: None, None

    with emulated(capability), contextlib.ExitStack() as stack:
        for name, value in real.items():
            stack.enter_context(mock.patch.object(gemm_base, name, value))
        stack.enter_context(mock.patch.object(gemm_base, "_compile_block_scaled_gemm", compiling))
        stack.enter_context(mock.patch.object(gemm_base, "get_device_sm_count", return_value=MULTIPROCESSORS))
        stack.enter_context(mock.patch.object(gemm_base, "get_device_index", return_value=0))
        for what, call in _calls(capability):
            before = len(seen)
            call()
            for key in list(seen)[before:]:
                yield f"{what} {key}", *seen[key]


def _calls(capability: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Products of zeros by every back end in CuTe DSL that runs on the card, as our operator makes them."""
    import torch

    from halfbyte.formats import FORMATS
    from halfbyte_cuda_blackwell import ops
    from halfbyte_cuda_blackwell.backends import BACKENDS
    from halfbyte_cuda_blackwell.packing import padded_scale_shape

    def zeros(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns, dtype=torch.uint8)

    backends = [one for one in BACKENDS.values() if one.name in ("cute-dsl", "b12x") and capability in one.capabilities]
    for own, (n, k), rows in itertools.product(backends, SIZES, ROWS):
        for name in own.formats:
            group = FORMATS[name].group_size
            operands = (zeros(rows, k // 2), zeros(*padded_scale_shape(rows, k // group)))
            weight = (zeros(n, k // 2), zeros(*padded_scale_shape(n, k // group)))
            arguments = (*operands, *weight, torch.ones(1), own.name, group, 128, torch.bfloat16)
            yield f"{own.name} {name} M={rows} {n}x{k}", functools.partial(ops.mm_fp4, *arguments)


def _compile(gemm: Any, named: dict[str, Any], folder: Path) -> tuple[float, set[str]]:
    """Compile as FlashInfer does; the seconds, and the block-scaled instructions of the PTX."""
    from flashinfer.gemm import gemm_mm_fp4_cute_dsl

    wanted = ("ab_cutlass_dtype", "sf_dtype", "c_cutlass_dtype", "ab_assumed_align", "swap_ab", "sf_m", "sf_n", "sf_k")
    own = {name: named[name] for name in (*wanted, "batch_size")}
    for path in folder.rglob("*.ptx"):  # of the kernel before: they may have one name
        path.unlink()
    start = time.perf_counter()
    gemm_mm_fp4_cute_dsl._make_blockscaled_gemm_compile_fn(
        gemm, **own, max_active_clusters=MULTIPROCESSORS, per_token_alpha=named.get("per_token_alpha")
    )()
    seconds = time.perf_counter() - start
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.ptx"))
    return seconds, set(BLOCK_SCALED.findall(text))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
