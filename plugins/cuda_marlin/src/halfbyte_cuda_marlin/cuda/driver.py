"""The CUDA driver, called directly: loading machine code and launching it on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import PluginError
from halfbyte_cuda_marlin.cuda.cards import card
from halfbyte_cuda_marlin.cuda.nvrtc import Macros, machine_code

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
CLUSTER_DIMENSION = 4
PROGRAMMATIC_STREAM_SERIALIZATION = 6
_INVALID_CONTEXT = 201
#: Faults of a kernel that ran before, whoever launched it: an address, an assertion, the launch itself.
_OF_EARLIER_KERNELS = (700, 710, 716, 719)


#: How the arguments of linear layers' matrix kernels begin; `pointers` gives the values.
POINTERS = tuple((name, ctypes.c_void_p) for name in ("x", "w", "row_mult", "bias", "y", "part", "counter"))


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, for values that are a number, or three."""

    _fields_ = (
        *(("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int)),
        *(("second", ctypes.c_int), ("third", ctypes.c_int), ("rest", ctypes.c_char * 52)),
    )


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


@functools.cache
def driver() -> Any:
    """The driver's library."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4
    return library


@functools.cache
def function(
    kernel: str, name: str, device: int, arch: str, macros: Macros = (), *, dynamic: bool = True
) -> ctypes.c_void_p:
    """The kernel compiled for these macros and loaded on a device; PluginError if that fails.

    `dynamic`: it takes shared memory at launch, up to what cards.card says.
    """
    module, loaded = ctypes.c_void_p(), ctypes.c_void_p()
    code = machine_code(kernel, arch, macros)
    with torch.cuda.device(device):
        bind(device)
        check(driver().cuModuleLoadData(ctypes.byref(module), code), f"cuModuleLoadData of {kernel} for {arch}")
        check(driver().cuModuleGetFunction(ctypes.byref(loaded), module, name.encode()), "cuModuleGetFunction")
        if dynamic:
            attribute, most = _MAX_DYNAMIC_SHARED_SIZE_BYTES, card(device).shared
            check(driver().cuFuncSetAttribute(loaded, attribute, most), "cuFuncSetAttribute")
    return loaded


def bind(device: int) -> None:
    """Make the device's primary context this thread's, if the thread has none: torch does so only at some calls."""
    context, ordinal = ctypes.c_void_p(), ctypes.c_int()
    check(driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if not context:
        check(driver().cuDeviceGet(ctypes.byref(ordinal), device), "cuDeviceGet")
        check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal), "cuDevicePrimaryCtxRetain")
        check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


def launch_bound(config: int, kernel: ctypes.c_void_p, parameters: int, device: int) -> int:
    """cuLaunchKernelEx; once more with the device's context, where this thread had none."""
    failed: int = driver().cuLaunchKernelEx(config, kernel, parameters, None)
    if failed == _INVALID_CONTEXT:
        bind(device)
        failed = driver().cuLaunchKernelEx(config, kernel, parameters, None)
    return failed


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
    device = torch.cuda.current_device()
    stream = torch._C._cuda_getCurrentRawStream(device)
    attribute = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1)
    config = Config(blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(attribute), int(early))
    addresses = (ctypes.addressof(arguments), *(() if tensor_map is None else (tensor_map,)))
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    failed = launch_bound(ctypes.addressof(config), kernel, ctypes.addressof(parameters), device)
    check(failed, "cuLaunchKernelEx")


def pointers(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """The tensors' addresses on the device, in the order of POINTERS."""
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)


def tensor_map(x: Tensor, rows: int) -> tuple[Any, int]:
    """(memory to keep, address) of a map of x [M, K]; see `encode_map`."""
    memory = ctypes.create_string_buffer(192)
    address = (ctypes.addressof(memory) + 63) & ~63
    encode_map(address, x.data_ptr(), (x.shape[0], x.shape[1]), rows, bf16=x.dtype == torch.bfloat16)
    return memory, address


def encode_map(address: int, x: int, shape: tuple[int, int], rows: int, *, bf16: bool) -> None:
    """Write to an address, a multiple of 64, the map of x of this shape in boxes of `rows` x 64 two-byte numbers.

    128-byte swizzle; what is outside of x reads as zero.
    """
    sizes, strides = (ctypes.c_uint64 * 2)(shape[1], shape[0]), (ctypes.c_uint64 * 1)(2 * shape[1])
    box, steps = (ctypes.c_uint32 * 2)(64, rows), (ctypes.c_uint32 * 2)(1, 1)
    kind, start = 9 if bf16 else 6, ctypes.c_void_p(x)
    failed = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), kind, 2, start, sizes, strides, box, steps, 0, 3, 3, 0
    )
    check(failed, "cuTensorMapEncodeTiled")


def check(failed: int, what: str) -> None:
    """PluginError that names the driver's function and its error, unless `failed` is zero."""
    if not failed:
        return
    name = ctypes.c_char_p()
    driver().cuGetErrorName(failed, ctypes.byref(name))
    hint = "; CUDA also reports here what an earlier kernel of any library did" if failed in _OF_EARLIER_KERNELS else ""
    raise PluginError(f"marlin.cuda: {what} failed with {(name.value or b'an error').decode()} ({failed}){hint}")
