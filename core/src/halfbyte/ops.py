"""Two custom operators that make every kernel safe under torch.compile, and the one validator of their inputs.

`halfbyte::linear` and `halfbyte::experts` are opaque to the compiler. Their `key` names an entry of a process-wide
registry that the modules fill: the kernel, the problem and the names of the packed tensors. The key is made of the
kernel's target and the problem alone, so that compiled code can be cached. Modules call `run_linear` and `run_experts`
directly in plain eager mode: the operators are for tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.kernels import ExpertsKernel, LinearKernel, Packed
from halfbyte.problems import DTYPES, ExpertsProblem, LinearProblem, Problem
from halfbyte.specs import KernelSpec
from halfbyte.weights import dtype_name


@dataclass(frozen=True, slots=True)
class _Entry:
    kernel: LinearKernel | ExpertsKernel
    problem: Problem
    names: tuple[str, ...]


_ENTRIES: dict[str, _Entry] = {}
_DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in DTYPES}


def register(spec: KernelSpec, kernel: LinearKernel | ExpertsKernel, packed: Packed) -> str:
    """Enter a kernel and what it runs into the registry; return the key, the same for the same kernel and problem."""
    names = tuple(packed.tensors)
    key = f"{spec.id} ({spec.target}): {packed.problem} ({', '.join(names)})"
    _ENTRIES[key] = _Entry(kernel, packed.problem, names)
    return key


def tracing(x: Tensor) -> bool:
    """Whether x must go through the operators: it is being compiled or exported, or is no plain tensor."""
    return torch.compiler.is_compiling() or type(x) is not Tensor


def device_of(packed: Packed) -> torch.device:
    """The device that the packed tensors are on; there the kernel runs."""
    return next(iter(packed.tensors.values())).device


@torch.library.custom_op("halfbyte::linear", mutates_args=())
def linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, key: str) -> Tensor:
    """Return y [M, n] for x [M, k] and the packed tensors in the order in which the kernel named them.

    `bias` [n] only for kernels that fuse it. UsageError for a key that was never registered in this process, and for
    inputs that `check_linear_inputs` refuses.
    """
    kernel, weights = _open(key, packed)
    return run_linear(kernel, x, weights, bias)


@linear.register_fake
def _linear_fake(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, key: str) -> Tensor:
    _, weights = _open(key, packed)
    return x.new_empty(x.shape[0], check_linear_inputs(x, weights, bias).n)


def run_linear(kernel: LinearKernel, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`linear` without the dispatcher."""
    problem = check_linear_inputs(x, packed, bias)
    return kernel.apply(x, packed, bias) if x.numel() else x.new_empty(0, problem.n)


@torch.library.custom_op("halfbyte::experts", mutates_args=())
def experts(
    x: Tensor, packed: Sequence[Tensor], topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None, key: str
) -> Tensor:
    """Return y [T, H] for x [T, H], ids int32 [T, k] and weights float32 [T, k]; see `kernels.ExpertsKernel`.

    UsageError as for `linear`; on a CPU also for expert numbers out of range.
    """
    kernel, weights = _open(key, packed)
    return run_experts(kernel, x, weights, topk_ids, topk_weights, expert_map)


@experts.register_fake
def _experts_fake(
    x: Tensor, packed: Sequence[Tensor], topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None, key: str
) -> Tensor:
    _, weights = _open(key, packed)
    check_experts_inputs(x, weights, topk_ids, topk_weights, expert_map)
    return torch.empty_like(x)


def run_experts(
    kernel: ExpertsKernel, x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None
) -> Tensor:
    """`experts` without the dispatcher."""
    problem = check_experts_inputs(x, packed, topk_ids, topk_weights, expert_map)
    if not x.shape[0]:
        return torch.empty_like(x)
    if x.device.type == "cpu":  # elsewhere looking at the numbers would wait for the device
        _check_expert_numbers(problem, topk_ids, expert_map)
    return kernel.apply(x, packed, topk_ids, topk_weights, expert_map)


def check_linear_inputs(x: Tensor, packed: Packed, bias: Tensor | None) -> LinearProblem:
    """Return the problem; UsageError naming what was found and expected unless the kernel can take these inputs."""
    problem = packed.problem
    if not isinstance(problem, LinearProblem):
        raise UsageError(f"halfbyte::linear was given the weights of {problem}")
    dtype, device = _DTYPES[problem.dtype], device_of(packed)
    # The usual x in one condition, since this is a part of every eager call.
    if not (x.ndim == 2 and x.shape[1] == problem.k and x.dtype is dtype and x.device == device and x.is_contiguous()):
        _check("x", x, ("M", problem.k), dtype, device, problem)
    if bias is not None:
        _check("bias", bias, (problem.n,), dtype, device, problem)
    return problem


def check_experts_inputs(
    x: Tensor, packed: Packed, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None
) -> ExpertsProblem:
    """Return the problem; UsageError naming what was found and expected unless the kernel can take these inputs."""
    problem = packed.problem
    if not isinstance(problem, ExpertsProblem):
        raise UsageError(f"halfbyte::experts was given the weights of {problem}")
    device = device_of(packed)
    _check("x", x, ("T", problem.hidden), _DTYPES[problem.dtype], device, problem)
    routing = (x.shape[0], problem.top_k)
    _check("topk_ids", topk_ids, routing, torch.int32, device, problem)
    _check("topk_weights", topk_weights, routing, torch.float32, device, problem)
    if expert_map is not None:
        _check("expert_map", expert_map, ("global experts",), torch.int32, device, problem)
    return problem


def _open(key: str, tensors: Sequence[Tensor]) -> tuple[Any, Packed]:
    """The kernel that a key names, and its packed weights made of the tensors."""
    try:
        entry = _ENTRIES[key]
    except KeyError:
        raise UsageError(f"no kernel is registered as {key!r}; make its module in this process first") from None
    if len(tensors) != len(entry.names):
        raise UsageError(f"{len(tensors)} packed tensors given, expected {len(entry.names)}: {list(entry.names)}")
    return entry.kernel, Packed(entry.problem, dict(zip(entry.names, tensors, strict=True)))


def _check(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | torch.SymInt | str],
    dtype: torch.dtype,
    device: torch.device,
    problem: Problem,
) -> None:
    """UsageError unless the tensor is as asked; a text in `shape` stands for any size."""
    found = tensor.shape
    fits = len(found) == len(shape) and all(
        isinstance(size, str) or size == of for size, of in zip(shape, found, strict=True)
    )
    if fits and tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous():
        return
    expected = f"{dtype_name(dtype)} [{', '.join(map(str, shape))}] on {device}, contiguous"
    strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    if not fits:
        fix = "give a tensor of that shape"
    elif tensor.device != device:
        fix = f"move it with .to({str(device)!r})"
    else:
        fix = f"convert it with .to(torch.{dtype_name(dtype)}).contiguous()"
    raise UsageError(
        f"{name} is {dtype_name(tensor.dtype)} {list(found)} on {tensor.device}{strides}; "
        f"{problem} takes {expected}; {fix}"
    )


def _check_expert_numbers(problem: ExpertsProblem, topk_ids: Tensor, expert_map: Tensor | None) -> None:
    count = problem.experts
    if expert_map is not None:
        _check_range("expert_map", expert_map, -1, count)
        count = expert_map.numel()
    _check_range("topk_ids", topk_ids, 0, count)


def _check_range(name: str, numbers: Tensor, low: int, count: int) -> None:
    least, most = (int(number) for number in torch.aminmax(numbers)) if numbers.numel() else (low, low)
    if least < low or most >= count:
        raise UsageError(f"{name} has expert {most if most >= count else least}; expected {low} to {count - 1}")
