"""CUDA C++ to machine code at run time, through NVRTC; what was compiled once is kept on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
import uuid
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from halfbyte.errors import PluginError

#: What a kernel is compiled for: names and values of its macros.
Macros = tuple[tuple[str, int], ...]
_LOADING: Final = threading.Lock()


@functools.cache
def machine_code(kernel: str, arch: str, macros: Macros) -> bytes:
    """What the driver loads: the cubin of kernels/KERNEL.cu for "sm_90a" and these macros, PTX for "compute_80".

    PluginError with NVRTC's log if it does not compile.
    """
    text, included = source(kernel), headers(dict(macros))
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros)]
    identity = repr((text, included, options, version("cuda-bindings"))).encode()
    kept = _cache_folder() / f"{kernel}-{hashlib.sha256(identity).hexdigest()[:24]}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    cubin = _compile(kernel, text, included, options)
    _keep(kept, cubin)
    return cubin


def source(kernel: str) -> str:
    """The source of kernels/KERNEL.cu, or of a header with its whole name."""
    name = kernel if kernel.endswith(".cuh") else f"{kernel}.cu"
    return (files("halfbyte_cuda_marlin.cuda") / "kernels" / name).read_text(encoding="utf-8")


def headers(macros: dict[str, int]) -> dict[str, str]:
    """What kernels may include, by name: `wgmma.cuh` is written for NTOK tokens, or for every NSTEP up to them."""
    known = {
        name: source(name) for name in ("fp4.cuh", "few.cuh", "barriers.cuh", "cluster.cuh", "ring.cuh", "experts.cuh")
    }
    if "NTOK" in macros:
        most, bf16 = macros["NTOK"], bool(macros["BF16"])
        step = macros.get("NSTEP", most)
        known["wgmma.cuh"] = "".join(_wgmma(tokens, bf16=bf16) for tokens in range(step, most + 1, step))
    return known


def _wgmma(tokens: int, *, bf16: bool) -> str:
    """`wgmma(d, a, desc)`: d += 64 rows of W from registers times `tokens` columns of x from shared memory."""
    count, kind = tokens // 2, "bf16" if bf16 else "f16"
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void wgmma(float (&d)[{count}], const u32 (&a)[4], u64 desc) {{\n"
        f'  asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} "\n'
        f'      "{{{sums}}}, {{{a}}}, %{count + 4}, 1, 1, 1, 0;"\n'
        f'      : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc));\n}}\n'
    )


def _compile(kernel: str, text: str, included: dict[str, str], options: list[str]) -> bytes:
    nvrtc = _nvrtc()
    contents, names = [text.encode() for text in included.values()], [name.encode() for name in included]
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), f"{kernel}.cu".encode(), len(names), contents, names)
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(failed):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise PluginError(f"marlin.cuda: NVRTC cannot compile {kernel}.cu for {options}:\n{log.decode().strip()}")
    kind = "PTX" if any("=compute_" in option for option in options) else "CUBIN"
    _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
    code = b" " * size
    getattr(nvrtc, f"nvrtcGet{kind}")(program, code)
    return bytes(code)


def _nvrtc() -> Any:
    """NVRTC's bindings, their library loaded; PluginError that says which release fits torch if there is none."""
    import torch

    try:
        with _LOADING:  # the bindings' first call fills a table, and threads may compile side by side
            from cuda.bindings import nvrtc

            nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings raise RuntimeError or worse when they do not find the library
        cuda = (torch.version.cuda or "13").partition(".")[0]
        raise PluginError(
            f"marlin.cuda: NVRTC cannot be loaded ({error}). Its bindings must be of the CUDA release that torch was "
            f"built for: pip install 'cuda-bindings=={cuda}.*'"
        ) from error
    return nvrtc


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "halfbyte"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte"


def _keep(file: Path, content: bytes) -> None:
    """Write atomically; a folder that cannot be written only costs compiling again next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{uuid.uuid4().hex}")
        own.write_bytes(content)
        own.replace(file)
    except OSError:
        return
