"""Level 2 for experts: our kernels run over a card that is not there, and what they would launch is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cuda_blackwell.absent_card import OnCard, absent_card
from cuda_blackwell.products import Compiled, products
from halfbyte.conformance import data
from halfbyte.kernels import ExpertsKernel, Packed, load_kernel
from halfbyte.problems import ExpertsProblem
from halfbyte.schemes import SCHEMES
from halfbyte.specs import Fidelity, KernelSpec
from halfbyte_cuda_blackwell.experts_specs import EXPERTS

ROWS = (1, 16, 64, 512, 4096)
#: Rows for activations that are not the kernel's first.
FEW_ROWS = (16,)
EXAMPLE = ExpertsProblem(
    scheme=SCHEMES["nvfp4-w4a4"], experts=8, top_k=2, hidden=2048, intermediate=768, input_scales="one"
)
#: Of those in CuTe DSL and cuTile. The others: nvcc's hundreds of files, and binaries that are fetched.
KERNELS = ("flashinfer.b12x", "flashinfer.b12x-a16", "flashinfer.cute-dsl", "flashinfer.cute-dsl-a16")
CUTILE = "flashinfer.cutile"
#: It adds up what the experts gave.
WITHOUT_PRODUCT = ("_MoeFinalizeKernel",)


def in_cute_dsl(capability: int, folder: Path) -> Iterator[Compiled]:
    """What our kernels in CuTe DSL launch on such a card, and the products in its PTX, which `folder` gets."""
    from cutlass import cute
    from flashinfer.fused_moe.cute_dsl import moe_utils

    found: list[Compiled] = []
    with absent_card(capability), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cute, "compile", _Compiling(cute.compile, folder, found)))
        # Sorting by experts is compiled by nvcc, with headers that FlashInfer fetches.
        stack.enter_context(mock.patch.object(moe_utils, "_get_moe_utils_module", mock.MagicMock))
        for spec in EXPERTS:
            if spec.id in KERNELS and f"sm_{capability}" in spec.devices:
                yield from _calls(spec, EXAMPLE, found)


def in_cutile(capability: int) -> Iterator[Compiled]:
    """What our kernel in cuTile launches on such a card. Its products are unrolled over K: so a smaller layer."""
    import cuda.tile

    problem = dataclasses.replace(EXAMPLE, hidden=512, intermediate=256)
    found: list[Compiled] = []
    done: set[str] = set()

    def launch(_stream: Any, _grid: Any, kernel: Any, arguments: tuple[Any, ...]) -> None:
        signature = _signature(kernel, arguments)
        key = f"{signature.symbol} {kernel._compiler_options}"
        if key not in done:
            done.add(key)
            found.append(_machine_code(kernel, signature, f"sm_{capability}"))

    with absent_card(capability), mock.patch.object(cuda.tile, "launch", launch):
        for spec in EXPERTS:
            if spec.id == CUTILE and f"sm_{capability}" in spec.devices:
                yield from _calls(spec, problem, found)


def _calls(spec: KernelSpec, example: ExpertsProblem, found: list[Compiled]) -> Iterator[Compiled]:
    """Run the kernel for all of its schemes; yield what is found meanwhile, under the name of the call."""
    for name, fidelity in spec.schemes.items():
        if fidelity is not Fidelity.NATIVE:
            continue
        for activation in spec.activations:
            problem = dataclasses.replace(example, scheme=SCHEMES[name], activation=activation)
            for rows, run in _runs(spec, problem, ROWS if activation == spec.activations[0] else FEW_ROWS):
                run()
                for one in found:
                    what = f"{spec.id} {name} {activation} M={rows} {one.kernel}"
                    wanted = name.endswith("w4a4") and one.kernel not in WITHOUT_PRODUCT
                    yield dataclasses.replace(one, kernel=what, block_scaled=wanted)
                found.clear()


def _runs(
    spec: KernelSpec, problem: ExpertsProblem, rows: tuple[int, ...]
) -> Iterator[tuple[int, Callable[[], object]]]:
    sizes = (problem.experts, problem.hidden, problem.intermediate)
    kernel = load_kernel(spec)
    assert isinstance(kernel, ExpertsKernel)
    weights = data.experts_weights(
        problem.scheme, *sizes, dtype=torch.bfloat16, gated=problem.gated, shared=True, input_scales="one"
    )
    with OnCard():
        packed = Packed(problem=problem, tensors=kernel.prepare(weights, problem))
    for count in rows:
        x = data.activations(count, problem.hidden, torch.bfloat16)
        ids, factors = data.routing(count, problem.experts, problem.top_k)

        def run(x: Any = x, ids: Any = ids, factors: Any = factors) -> object:
            with OnCard():
                return kernel.apply(x, packed, ids, factors)

        yield count, run


class _Compiling:
    """`cute.compile`, which notes what it compiled; what it returns does nothing."""

    def __init__(self, compiling: Any, folder: Path, found: list[Compiled]) -> None:
        self.compiling, self.folder, self.found = compiling, folder, found

    def __getitem__(self, options: Any) -> _Compiling:
        return _Compiling(self.compiling[options], self.folder, self.found)

    def __call__(self, kernel: Any, *arguments: Any, **named: Any) -> Callable[..., None]:
        name = type(getattr(kernel, "__self__", kernel)).__name__
        seconds, found = products(lambda: self.compiling(kernel, *arguments, **named), self.folder)
        self.found.append(Compiled(name, seconds, found))
        return lambda *_, **__: None


def _signature(kernel: Any, arguments: tuple[Any, ...]) -> Any:
    """What cuTile would derive from these arguments, but for facts about their addresses and sizes."""
    import cuda.tile as ct
    from cuda.tile import compilation

    def constraint(argument: Any, annotation: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            scalar = ct.int32 if isinstance(argument, int) else ct.float32
            return argument if annotation.constant else compilation.ScalarConstraint(scalar)
        return compilation.ArrayConstraint(
            getattr(ct, str(argument.dtype).removeprefix("torch.")),
            argument.ndim,
            index_dtype=ct.int32,
            stride_lower_bound_incl=0,
            stride_constant=[*[None] * (argument.ndim - 1), 1],
            alias_groups=(),
            may_alias_internally=False,
            base_addr_divisible_by=16,
        )

    function = kernel._annotated_function
    pairs = zip(arguments, function.parameter_annotations, strict=True)
    convention = compilation.CallingConvention.cutile_python_v1()
    signature = compilation.KernelSignature([constraint(*pair) for pair in pairs], convention)
    return signature.with_mangled_symbol(function.pyfunc.__name__)


def _machine_code(kernel: Any, signature: Any, arch: str) -> Compiled:
    from cuda.tile import compilation

    cubin, start = io.BytesIO(), time.perf_counter()
    compilation.export_kernel(kernel, [signature], cubin, gpu_code=arch, output_format="cubin")
    size = f"{len(cubin.getvalue()) // 1000} kB of machine code"
    return Compiled(kernel._annotated_function.pyfunc.__name__, time.perf_counter() - start, frozenset([size]))
