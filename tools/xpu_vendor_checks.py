"""Run the host checks of the real vllm-xpu-kernels, without a GPU, on exactly the tensors that our kernels pass.

    python -m venv VENV
    VENV/bin/pip install intel-sycl-rt==2026.1.2
    VENV/bin/pip install --no-deps vllm-xpu-kernels==0.1.16.2
    python tools/xpu_vendor_checks.py VENV          # with the Python that halfbyte is installed in; needs a C compiler

The wheel's libraries are loaded beside three stubs (of Level Zero and torch's XPU build) that have no function. Each
call of an operator is made twice: in a forked child by the vendor's own code, which checks its arguments and then ends
at the first function that would touch a device ("passed"), and in this process by our double, so that the kernels and
the vendor's own Python go on. A call that the vendor refuses is an error. Never do this outside of such a job.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

_STUBS: Final = {
    "libc10_xpu.so": "char _ZN3c103xpu19XPUCachingAllocator9allocatorE[64];",
    "libtorch_xpu.so": "int stub_of_torch_xpu;",
    "libze_loader.so.1": "int stub_of_ze_loader;",
}
_INSIDE: Final = "--inside"
#: Where the calls are that are refused, as the package `xpu`.
_TESTS: Final = Path(__file__).parents[1] / "tests"
#: What the loader exits with where a function is missing: the vendor's checks are over.
_DEVICE_REACHED: Final = 127


def main() -> int:
    """Build the stubs and start over with them; or, inside, run everything and print what the vendor said."""
    if sys.argv[1:2] == [_INSIDE]:
        return run(Path(sys.argv[2]))
    (environment,) = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        for name, source in _STUBS.items():
            command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", f"{folder}/{name}", f"-Wl,-soname,{name}"]
            subprocess.run(command, input=source, text=True, check=True)
        (packages,) = environment.glob("lib/python*/site-packages")
        path = os.pathsep.join((folder, str(environment / "lib")))
        command = [sys.executable, __file__, _INSIDE, str(packages)]
        return subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": path}, check=False).returncode


def run(packages: Path) -> int:
    """Print one line for each operator and the errors; 1 if there was one."""
    sys.path[:0] = [str(packages), str(_TESTS)]
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
    import torch

    from halfbyte_xpu.testing import vllm
    from halfbyte_xpu.vllm_kernels import schemas

    torch.set_num_threads(1)
    passed: Counter[str] = Counter()
    errors: list[str] = []
    for name in ("_C", "_moe_C", "_xpu_C"):
        importlib.import_module(f"{schemas.PACKAGE}.{name}")
    for op in dict.fromkeys((*schemas.LINEAR_OPS, *schemas.EXPERTS_OPS)):
        own = vllm.implementation(op)
        key = "XPU" if op in vllm.HOMES else "CompositeImplicitAutograd"
        print(f"{op}: registered for {key}: {torch._C._dispatch_has_kernel_for_dispatch_key(str(op), key)}")
        found = schemas.read_schema(packages / schemas.PACKAGE / f"{op.library}.abi3.so", op.name)
        if found != op.schema:
            errors.append(f"{op}: the schema in the wheel's bytes is {found!r}")
        if op in vllm.HOMES:
            library = torch.library.Library(op.library, "IMPL")
            vllm.LIBRARIES.append(library)
            library.impl(op.name, _checked(op, own, passed, errors), "CPU")
    errors += run_refused()
    problems = run_linear() + run_experts()
    refused = run_malformed(passed)
    for name, count in sorted(passed.items()):
        print(f"{name}: {count} calls passed the vendor's checks")
    print(f"{problems} problems gave what the conformance kit's oracle expects")
    print(f"{refused} malformed or unwanted calls were refused by us before the vendor saw them")
    print("\n".join(errors) or "the vendor refused nothing")
    return 1 if errors else 0


def _checked(op: Any, own: Callable[..., Any], passed: Counter[str], errors: list[str]) -> Callable[..., Any]:
    import torch

    vendors = getattr(getattr(torch.ops, op.library), op.name).default
    xpu = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)

    def call(*arguments: Any) -> Any:
        code, said = _in_child(lambda: vendors.redispatch(xpu, *arguments))
        if code == 0 or (code == _DEVICE_REACHED and "undefined symbol" in said):
            passed[f"{op}{'' if code else ' (returned)'}"] += 1
        else:
            errors.append(f"{op}: exit code {code}: {said.strip().splitlines()[0] if said.strip() else ''}")
        return own(*arguments)

    return call


def _in_child(action: Callable[[], Any]) -> tuple[int, str]:
    """The exit code of a forked child that calls this, and what it wrote."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 2)
        try:
            action()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def run_linear() -> int:
    """Run xpu.fp4-gemm on problems of every kind; RuntimeError where the result is not the oracle's."""
    import torch

    from halfbyte.conformance import data, oracle
    from halfbyte.conformance.tolerances import errors, tolerance
    from halfbyte.kernels import Packed
    from halfbyte.schemes import MXFP4_W4A4
    from halfbyte.weights import dtype_name
    from halfbyte_xpu.vllm_kernels.linear import Fp4Gemm
    from halfbyte_xpu.vllm_kernels.specs import SPECS

    problems, kernel, rounding = 0, Fp4Gemm(), SPECS[0].activation_rounding
    sizes = ((1, 32), (7, 64), (64, 128), (129, 96), (2880, 2880))
    for dtype, (n, k) in product((torch.bfloat16, torch.float16), sizes):
        weights = data.linear_weights(MXFP4_W4A4, n, k, dtype=dtype, bias=True)
        packed = Packed(weights.problem(dtype), kernel.prepare(weights, weights.problem(dtype)))
        allowed = tolerance("linear", "mxfp4", dtype_name(dtype), quantizes=True)
        for rows, bias in ((1, None), (3, weights.matrix.bias), (n, weights.matrix.bias), (129, None)):
            x = data.activations(rows, k, dtype)
            expected = oracle.linear(x, replace(weights, matrix=replace(weights.matrix, bias=bias)), rounding)
            _check(errors(kernel.apply(x, packed, bias), expected).within(allowed), f"{n}x{k} {dtype}, {rows} rows")
            problems += 1
    return problems


def run_experts() -> int:
    """The same for xpu.fused-moe: the vendor's own Python, over the double's operators."""
    import torch

    from halfbyte.conformance import data, oracle
    from halfbyte.conformance.tolerances import errors, tolerance
    from halfbyte.kernels import Packed
    from halfbyte.problems import ACTIVATIONS
    from halfbyte.schemes import MXFP4_W4A16
    from halfbyte.weights import dtype_name
    from halfbyte_xpu.vllm_kernels.experts import FusedMoe
    from halfbyte_xpu.vllm_kernels.specs import TOP_K

    problems, kernel = 0, FusedMoe()
    for dtype, activation in product((torch.bfloat16, torch.float16), ACTIVATIONS):
        gated, biased = activation != "relu2", activation == "swigluoai"
        weights = data.experts_weights(MXFP4_W4A16, 16, 64, 96, dtype=dtype, gated=gated, bias=biased)
        allowed = tolerance("experts", "mxfp4", dtype_name(dtype), quantizes=False)
        x = data.activations(5, 64, dtype)
        for top_k in TOP_K:
            problem = weights.problem(dtype, top_k=top_k, activation=activation)
            packed = Packed(problem, kernel.prepare(weights, problem))
            ids, shares = data.routing(5, 16, top_k)
            places = torch.arange(16, dtype=torch.int32).flip(0) if top_k == 2 else None
            expected = oracle.experts(x, weights, ids, shares, activation=activation, rounding=None, expert_map=places)
            _check(errors(kernel.apply(x, packed, ids, shares, places), expected).within(allowed), str(problem))
            problems += 1
    return problems


def _check(fine: bool, problem: str) -> None:
    if not fine:
        raise RuntimeError(f"{problem}: the result is not the oracle's")


def run_refused() -> list[str]:
    """Make the calls that the vendor is known to refuse; return a line for each that it takes, or refuses otherwise."""
    import torch

    from xpu.refused import CALLS

    errors, xpu = [], torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    for text, (op, arguments) in CALLS:
        vendors = getattr(getattr(torch.ops, op.library), op.name).default
        _, said = _in_child(partial(vendors.redispatch, xpu, *arguments))
        if text not in said:
            errors.append(f"{op} should say {text!r}; it says {said[:200]!r}")
    print(f"{len(CALLS) - len(errors)} of {len(CALLS)} calls were refused by the vendor in the words of our double")
    return errors


def run_malformed(passed: Counter[str]) -> int:
    """Make malformed or unwanted calls, most of which the vendor would take; RuntimeError for one not refused by us."""
    from halfbyte.errors import UsageError
    from xpu.malformed import CALLS

    before = dict(passed)
    for name, call in CALLS.items():
        try:
            call()
        except UsageError:
            continue
        raise RuntimeError(f"{name} was not refused")
    if dict(passed) != before:
        raise RuntimeError("a malformed call reached the vendor")
    return len(CALLS)


if __name__ == "__main__":
    sys.exit(main())
