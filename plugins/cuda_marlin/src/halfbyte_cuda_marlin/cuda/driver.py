"""The CUDA driver, called directly: loading machine code and launching it on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import PluginError
from halfbyte_cuda_marlin.cuda.nvrtc import Macros, machine_code

#: Shared memory that one block of threads may ask for on Hopper, in bytes.
SHARED_MEMORY = 231_424
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


#: How the arguments of both matrix kernels begin; `pointers` gives the values.
POINTERS = tuple((name, ctypes.c_void_p) for name in ("x", "w", "row_mult", "bias", "y", "part", "counter"))


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, for values that are a number."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@functools.cache
def _cuda() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def function(
    kernel: str, name: str, device: int, arch: str, macros: Macros = (), *, dynamic: bool = True
) -> ctypes.c_void_p:
    """The kernel compiled for these macros and loaded on a device; PluginError if that fails.

    `dynamic`: it takes shared memory at launch, up to SHARED_MEMORY.
    """
    module, loaded = ctypes.c_void_p(), ctypes.c_void_p()
    code = machine_code(kernel, arch, macros)
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the device's context
        _check(_cuda().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        _check(_cuda().cuModuleGetFunction(ctypes.byref(loaded), module, name.encode()), "cuModuleGetFunction")
        if dynamic:
            attribute = _MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(_cuda().cuFuncSetAttribute(loaded, attribute, SHARED_MEMORY), "cuFuncSetAttribute")
    return loaded


def launch(
    kernel: ctypes.c_void_p,
    blocks: int,
    threads: int,
    shared: int,
    arguments: ctypes.Structure,
    tensor_map: int | None = None,
    *,
    early: bool = False,
) -> None:
    """Launch on torch's current stream of the current device; `tensor_map` is the address of a second argument.

    `early`: the kernel may start before the one right before it has ended, and waits for it itself
    (griddepcontrol.wait). Only for kernels behind another of ours that started when all before had ended: what is read
    without waiting must have been written before that one.
    """
    stream = torch.cuda.current_stream().cuda_stream
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1)
    config = _Config(blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(attribute), int(early))
    addresses = (ctypes.addressof(arguments), *(() if tensor_map is None else (tensor_map,)))
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    _check(_cuda().cuLaunchKernelEx(ctypes.byref(config), kernel, parameters, None), "cuLaunchKernelEx")


def pointers(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """The tensors' addresses on the device, in the order of POINTERS."""
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)


def tensor_map(x: Tensor, rows: int) -> tuple[Any, int]:
    """(memory to keep, address) of a map of x [M, K] in boxes of `rows` x 64, 128-byte swizzle, zeros outside."""
    memory = ctypes.create_string_buffer(192)
    address = (ctypes.addressof(memory) + 63) & ~63
    m, k = x.shape
    kind = 9 if x.dtype == torch.bfloat16 else 6
    sizes, strides = (ctypes.c_uint64 * 2)(k, m), (ctypes.c_uint64 * 1)(2 * k)
    box, steps = (ctypes.c_uint32 * 2)(64, rows), (ctypes.c_uint32 * 2)(1, 1)
    start = ctypes.c_void_p(x.data_ptr())
    failed = _cuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), kind, 2, start, sizes, strides, box, steps, 0, 3, 3, 0
    )
    _check(failed, "cuTensorMapEncodeTiled")
    return memory, address


def _check(failed: int, what: str) -> None:
    if failed:
        raise PluginError(f"marlin.cuda: {what} failed with CUDA driver error {failed}")
