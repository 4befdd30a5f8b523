"""Level 2: compile the kernels in CuTe DSL and cuTile that our kernels select, for a card that is not there.

    python -m cuda_blackwell.cross_compile sm_100a      (in tests/; sm_103a, sm_120a, sm_121a, sm_89 and sm_90 too)

Needs nvidia-cutlass-dsl with its libraries for CUDA 13, Triton, cuda-tile and tileiras, and no card. FlashInfer's own
Python code chooses the tactic for every number of rows and builds the kernel. The exit code is 1 unless every product
of two FP4 matrices has block-scaled MMA in its PTX.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from cuda_blackwell.products import Compiled, products

ROWS = (1, 16, 64, 512, 4096)
SIZES = ((4096, 4096), (28672, 4096))
MULTIPROCESSORS = 148  # of a B200: tactics follow from it


def main(arch: str) -> int:
    """Compile for `arch`, print one line for each kernel; 0 if all that were compiled hold what they should."""
    capability = int(arch[3:].rstrip("a"))
    with tempfile.TemporaryDirectory() as folder:
        names = {"CUTE_DSL_ARCH": arch, "CUTE_DSL_KEEP_PTX": "1", "CUTE_DSL_DUMP_DIR": folder}
        os.environ |= names | {"FLASHINFER_CUTE_DSL_DISABLE_CACHE": "1", "CUDA_TILE_CACHE_DIR": "off"}
        found = []
        for one in _all(capability, Path(folder)):
            found.append(one)
            print(f"{arch} {one.kernel}: {one.seconds:.1f} s, {', '.join(sorted(one.products)) or 'no product'}")  # noqa: T201
    return 0 if found and all(one.ok for one in found) else 1


def _all(capability: int, folder: Path) -> Iterator[Compiled]:
    from cuda_blackwell import cross_compile_experts

    if capability >= 100:
        yield from _compiled(capability, folder)
        yield from _weight_only(capability, folder)
        yield from cross_compile_experts.in_cute_dsl(capability, folder)
    yield from cross_compile_experts.in_cutile(capability)


def _compiled(capability: int, folder: Path) -> Iterator[Compiled]:
    """Every kernel of mm_fp4 that some number of rows selects."""
    from flashinfer.gemm import gemm_base

    from cuda_blackwell.flashinfer_emulator.patches import emulated

    real = {name: getattr(gemm_base, name) for name in ("_cute_dsl_gemm_fp4_runner", "_b12x_gemm_fp4_runner")}
    seen: dict[str, tuple[float, frozenset[str]]] = {}

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
                yield Compiled(f"{what} {key}", *seen[key], block_scaled=True)


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


def _compile(gemm: Any, named: dict[str, Any], folder: Path) -> tuple[float, frozenset[str]]:
    """Compile as FlashInfer does; the seconds, and the products in the PTX."""
    from flashinfer.gemm import gemm_mm_fp4_cute_dsl

    wanted = ("ab_cutlass_dtype", "sf_dtype", "c_cutlass_dtype", "ab_assumed_align", "swap_ab", "sf_m", "sf_n", "sf_k")
    own = {name: named[name] for name in (*wanted, "batch_size")}
    compiling = gemm_mm_fp4_cute_dsl._make_blockscaled_gemm_compile_fn(
        gemm, **own, max_active_clusters=MULTIPROCESSORS, per_token_alpha=named.get("per_token_alpha")
    )
    return products(compiling, folder)


def _weight_only(capability: int, folder: Path) -> Iterator[Compiled]:
    """The same for mm_bf16_fp4's kernels of one size; on SM12x products are in float16."""
    import flashinfer.cute_dsl.utils
    from flashinfer.gemm import gemm_bf16_fp4_cute_dsl as library

    n, k = SIZES[0]
    done = set()
    with mock.patch.object(flashinfer.cute_dsl.utils, "get_max_active_clusters", return_value=MULTIPROCESSORS):
        for rows in ROWS:
            tactic, compiling = (_sm12x if capability >= 120 else _sm10x)(library, rows, n, k)
            if tactic not in done:
                done.add(tactic)
                yield Compiled(f"bf16-fp4 nvfp4 M={rows} {n}x{k} {tactic}", *products(compiling, folder))


def _sm12x(library: Any, rows: int, n: int, k: int) -> tuple[Any, Callable[[], object]]:
    import torch

    tile, atoms = library._select_bf16_fp4_tile_shape(rows, n, k)
    splits = library._select_bf16_fp4_k_splits(rows, n, k, tile, MULTIPROCESSORS)
    arguments = (tile, torch.bfloat16, torch.bfloat16, atoms)
    return (tile, splits), functools.partial(library._get_cute_dsl_bf16_fp4_gemm, *arguments, k_splits=splits)


def _sm10x(library: Any, rows: int, n: int, k: int) -> tuple[Any, Callable[[], object]]:
    import cutlass
    import torch
    from cutlass import cute
    from cutlass.cute.runtime import make_ptr

    x, weight = torch.empty(rows, k, device="meta"), torch.empty(n, k // 2, device="meta")
    valid = library._cute_dsl_sm100_bf16_fp4_runner().get_valid_tactics([x, weight, *[None] * 5], None)
    tactic = library._select_sm100_bf16_fp4_default_tactic(valid, rows, n, MULTIPROCESSORS)
    kinds = (cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.BFloat16, cutlass.Float32, cutlass.BFloat16)
    alignments = (32, 16, 32, 16, 32)
    pointers = [
        make_ptr(kind, to, cute.AddressSpace.gmem, assumed_align=to) for kind, to in zip(kinds, alignments, strict=True)
    ]
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=False)
    arguments = (*pointers, n, rows, k, MULTIPROCESSORS, stream, True, *tactic)
    return tactic, functools.partial(library._get_sm100_bf16_fp4_kernel, *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
