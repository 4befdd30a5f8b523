"""FP4Linear and FP4Experts: canonical weights in, a resolved kernel inside, ordinary torch modules outside.

Core does here, once for all kernels: N-D, strided and empty inputs, padding, slicing, bias where not fused, layers
whose parts have different global scales.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.decisions import Resolution
from halfbyte.errors import UsageError
from halfbyte.ops import device_of
from halfbyte.packing import Choice, PackedBuffers, choose, linear_parts, pack_experts, pack_linear
from halfbyte.policies import Policy
from halfbyte.problems import ExpertsProblem, LinearProblem
from halfbyte.weights import ExpertsWeights, LinearWeights

P = TypeVar("P", LinearProblem, ExpertsProblem)


class _PackedModule(nn.Module, Generic[P]):
    """What both modules share: the choice, a state that names it, and a device and dtype that stay."""

    def __init__(self, problem: P, choice: Choice, device: torch.device) -> None:
        super().__init__()
        self.problem: P = problem
        self.choice = choice
        self.device = device
        self.dtype: torch.dtype = getattr(torch, problem.dtype)

    @property
    def resolution(self) -> Resolution:
        """Which kernel was chosen, and why."""
        return self.choice.resolution

    def get_extra_state(self) -> Tensor:
        """The kernel and the problem, as JSON in a uint8 tensor, so that any container of tensors can hold it."""
        state = json.dumps({"kernel": self.choice.spec.id, "problem": self.problem.to_dict()}, sort_keys=True)
        return torch.tensor(list(state.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """UsageError naming both, unless the state was packed for the same kernel and problem."""
        found, own = (json.loads(bytes(tensor.tolist())) for tensor in (state, self.get_extra_state()))
        if found != own:
            raise UsageError(
                f"the state was packed for {_brief(found)}; this module runs {_brief(own)}. Make the module from the "
                "checkpoint's weights, or require the kernel that the state was packed for"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _PackedModule[P]:
        """Refuse another device or dtype: packed weights belong to the ones that they were prepared for."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (probe.device, probe.dtype) != (self.device, self.dtype):
            raise UsageError(
                f"{type(self).__name__} was packed by kernel {self.choice.spec.id!r} for {self.dtype} on "
                f"{self.device} and cannot be converted to {probe.dtype} on {probe.device}; "
                f"load it there: give device={str(probe.device)!r} and dtype={probe.dtype} when it is made"
            )

        def keeping_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor

        super()._apply(keeping_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _repr(self, sizes: str) -> str:
        return f"{sizes}, kernel={self.choice.spec.id}, scheme={self.problem.scheme}, dtype={self.dtype}"


class FP4Linear(_PackedModule[LinearProblem]):
    """y = x @ W.T + b with W in FP4: where a model has an nn.Linear. Inference only.

    Args:
        weights: what the checkpoint has; nothing of it is changed or kept.
        dtype: float32, bfloat16 or float16: the dtype of x and y.
        device: where it shall run; by default where the weights are.
        policy: demands on the choice of the kernel.
        resolution: the choice, if it was made already (`policy` then says nothing).

    Raises:
        NoKernelError: no kernel can run this; the message has every refusal.
        CheckpointError: the weights lack something that the kernel needs.
        UsageError: a dtype that no kernel takes, a device that is not there, a resolution for something else.
    """

    bias: Tensor | None

    def __init__(
        self,
        weights: LinearWeights,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        policy: Policy | None = None,
        resolution: Resolution | None = None,
    ) -> None:
        problem = weights.problem(dtype)
        where = torch.device(weights.matrix.packed.device if device is None else device)
        choice = choose(problem, where, policy, resolution)
        parts = pack_linear(choice, weights, problem, where)
        super().__init__(problem, choice, device_of(parts[0]))
        self.in_features, self.out_features = problem.k, problem.n
        self.parts = nn.ModuleList(PackedBuffers(choice, part) for part in parts)
        bias = weights.matrix.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(self.device, dtype, copy=True))
        padded = [part.problem.matrices[0] for part in parts]
        self._rows = [part.n for part in linear_parts(choice, weights.matrix)]
        self._k_padding = padded[0][1] - problem.k
        self._pads_n = sum(n for n, _ in padded) != problem.n
        # A bias for a part of the rows would have to be cut and padded at each call: adding it afterwards is cheaper.
        self._fuses_bias = choice.spec.fuses_bias and len(parts) == 1 and not self._pads_n
        # The one part that is called with x as it is: found without the lookups of nn.Module, which a call would feel.
        plain = len(parts) == 1 and not self._pads_n and not self._k_padding and (bias is None or self._fuses_bias)
        self._plain = tuple(self.parts) if plain else ()

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] for x [..., in_features], any strides, zero rows included, in the same dtype.

        UsageError for another last dimension, dtype or device, and for an x that requires gradients. Where N was
        padded, y is a slice of the kernel's result and its rows are not adjacent.
        """
        _check_inference(x)
        if self._plain:
            flat = x.ndim == 2 and x.shape[1] == self.in_features
            rows = x.contiguous() if flat else _rows(x, self.in_features)
            y: Tensor = self._plain[0].linear(rows, self._buffers["bias"])  # type: ignore[operator]
            return y if flat else y.view(*x.shape[:-1], self.out_features)
        rows = _rows(x, self.in_features, self._k_padding)
        fused = self.bias if self._fuses_bias else None
        results = [part.linear(rows, fused) for part in self.parts]  # type: ignore[operator]
        if self._pads_n:
            results = [y[:, :n] for y, n in zip(results, self._rows, strict=True)]
        y = results[0] if len(results) == 1 else torch.cat(results, dim=-1)
        if self.bias is not None and fused is None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, kernel, scheme and dtype."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return self._repr(sizes)


class FP4Experts(_PackedModule[ExpertsProblem]):
    """The experts of one mixture-of-experts layer in FP4; the routing is given. Inference only.

    Args:
        weights: what the checkpoint has; nothing of it is changed or kept.
        top_k: experts of each token.
        activation: one of `problems.ACTIVATIONS`.
        dtype: float32, bfloat16 or float16: the dtype of x and y.
        device: where it shall run; by default where the weights are.
        policy: demands on the choice of the kernel.
        resolution: the choice, if it was made already (`policy` then says nothing).

    Raises the errors of `FP4Linear`.
    """

    def __init__(
        self,
        weights: ExpertsWeights,
        *,
        top_k: int,
        activation: str,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        policy: Policy | None = None,
        resolution: Resolution | None = None,
    ) -> None:
        problem = weights.problem(dtype, top_k=top_k, activation=activation)
        where = torch.device(weights.up.packed.device if device is None else device)
        choice = choose(problem, where, policy, resolution)
        packed = pack_experts(choice, weights, problem, where)
        super().__init__(problem, choice, device_of(packed))
        self.packed = PackedBuffers(choice, packed)
        self._padding = packed.problem.matrices[-1][0] - problem.hidden

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """Return y [..., H] for x [..., H], any strides, zero tokens included, in the same dtype.

        Args:
            x: [..., H] in the module's dtype.
            topk_ids: [..., k], any integer dtype: the global numbers of each token's experts.
            topk_weights: [..., k], floating point: what each expert's output is multiplied by.
            expert_map: [global experts], any integer dtype: the number of each expert in this module, or -1 for one
                that is elsewhere and adds nothing. None: this module has all experts.

        UsageError for other shapes, dtypes or devices, for inputs that require gradients, and on a CPU for expert
        numbers out of range. Where H was padded, y is a slice of the kernel's result and its rows are not adjacent.
        """
        _check_inference(x)
        _check_inference(topk_weights)
        hidden, top_k = self.problem.hidden, self.problem.top_k
        rows = _rows(x, hidden, self._padding)
        ids = _rows(_integers("topk_ids", topk_ids), top_k)
        weights = _rows(topk_weights.to(torch.float32), top_k)
        local = None if expert_map is None else _integers("expert_map", expert_map).contiguous()
        y = self.packed.experts(rows, ids, weights, local)
        return (y[:, :hidden] if self._padding else y).view(x.shape)

    def extra_repr(self) -> str:
        """Sizes, kernel, scheme and dtype."""
        problem = self.problem
        return self._repr(
            f"experts={problem.experts}, top_k={problem.top_k}, hidden={problem.hidden}, "
            f"intermediate={problem.intermediate}, activation={problem.activation}, bias={problem.bias}"
        )


def _check_inference(tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UsageError(
            "FP4 layers are for inference only and an input requires gradients; "
            "call the model under torch.inference_mode() or torch.no_grad()"
        )


def _rows(tensor: Tensor, size: int, padding: int = 0) -> Tensor:
    """The tensor [..., size] as contiguous rows [M, size + padding]."""
    if tensor.ndim == 0 or tensor.shape[-1] != size:
        raise UsageError(f"an input has shape {list(tensor.shape)}; expected [..., {size}]")
    rows = tensor.reshape(-1, size)
    return F.pad(rows, (0, padding)) if padding else rows.contiguous()


def _integers(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        raise UsageError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected integers: expert numbers")
    return tensor.to(torch.int32)


def _brief(state: dict[str, Any]) -> str:
    problem = ", ".join(f"{key}={value}" for key, value in state["problem"].items())
    return f"kernel {state['kernel']!r} ({problem})"
