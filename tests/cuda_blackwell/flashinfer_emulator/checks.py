"""The preconditions of compiled kernels, as errors: what is not checked here would be read as something else."""

from __future__ import annotations

import torch
from torch import Tensor


def contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous, its strides are {tensor.stride()}")


def dtype(wanted: torch.dtype, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != wanted:
            raise RuntimeError(f"{name} is {tensor.dtype}, expected {wanted}")


def aligned(to: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.data_ptr() % to:
            raise RuntimeError(f"{name} is not aligned to {to} bytes")


def multiple(of: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size % of:
            raise RuntimeError(f"{name}={size} must be divisible by {of}")


def scalar(alpha: object) -> float:
    """The number in a global scale, as TVM FFI takes it: a float32 tensor, never None."""
    if not isinstance(alpha, Tensor):
        raise TypeError(f"Expected DLTensor* but got {alpha}")
    dtype(torch.float32, alpha=alpha)
    return alpha.item()


def result(out: Tensor, m: int, n: int) -> None:
    contiguous(out=out)
    if tuple(out.shape) != (m, n):
        raise RuntimeError(f"out is {tuple(out.shape)}, expected {(m, n)}")
