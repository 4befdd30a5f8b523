"""What the built-in kernels keep of a matrix, and how it becomes a weight again.

A matrix called `up` is kept as the tensors `up`, `up_scales`, `up_divisor`, `up_table`, `up_input_divisor` and
`up_input_table`, as far as its format and the scheme have them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.kernels import Packed
from halfbyte.matrix import Matrix
from halfbyte.numerics import GlobalScale, dequantize, fake_quantize, scale_codes
from halfbyte.schemes import Scheme


class Store(Protocol):
    """One way to keep the weights of a matrix [N, K], or of a stack [E, N, K]."""

    @staticmethod
    def keep(name: str, matrix: Matrix, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return new tensors on the matrix's device; the first has the plain name."""
        ...

    @staticmethod
    def weight(packed: Packed, name: str, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """Return the weight [N, K], of one expert if the matrix is a stack, as if dequantized in float32 first."""
        ...


class KeepPacked:
    """The packed values as they are; every use dequantizes."""

    @staticmethod
    def keep(name: str, matrix: Matrix, dtype: torch.dtype) -> dict[str, Tensor]:  # noqa: ARG004 - a Store
        """Packed values and scales uint8, the scale table float32 [parts or E, 256]."""
        codes = scale_codes(matrix.scales, matrix.format)
        tensors = {name: matrix.packed.clone(), f"{name}_scales": codes.clone()}
        return tensors | _keep_scale(name, matrix.global_scale, matrix.packed.device)

    @staticmethod
    def weight(packed: Packed, name: str, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """Dequantize in float32 and round once to `dtype`."""
        values, scales = packed[name], packed[f"{name}_scales"]
        if expert is not None:
            values, scales = values[expert], scales[expert]
        scale = _scale(packed, name, expert)
        return dequantize(values, scales, packed.problem.scheme.weights, global_scale=scale, dtype=dtype)


class KeepDequantized:
    """The weights in the compute dtype."""

    @staticmethod
    def keep(name: str, matrix: Matrix, dtype: torch.dtype) -> dict[str, Tensor]:
        """One tensor [..., N, K] in `dtype`, filled one expert at a time to bound the memory needed."""
        weight = torch.empty((*matrix.packed.shape[:-1], matrix.k), dtype=dtype, device=matrix.packed.device)
        stack, values, scales = (t if t.ndim == 3 else t.unsqueeze(0) for t in (weight, matrix.packed, matrix.scales))
        for index in range(stack.shape[0]):
            scale = None if matrix.global_scale is None else GlobalScale.of(matrix.global_scale[index], weight.device)
            stack[index] = dequantize(values[index], scales[index], matrix.format, global_scale=scale, dtype=dtype)
        return {name: weight}

    @staticmethod
    def weight(packed: Packed, name: str, dtype: torch.dtype, expert: int | None = None) -> Tensor:  # noqa: ARG004
        """A view of what is kept; it has the dtype already."""
        return packed[name] if expert is None else packed[name][expert]


def keep_input_scale(name: str, matrix: Matrix, scheme: Scheme) -> dict[str, Tensor]:
    """Return what `quantize_input` needs; CheckpointError naming the matrix if the scheme needs a scale it lacks."""
    if scheme.activations is None or not scheme.activations.has_global_scale:
        return {}
    if matrix.input_global_scale is None:
        raise CheckpointError(
            f"{matrix.name}: {scheme} quantizes activations with a calibrated input global scale, and there is none; "
            "calibrate the checkpoint anew, or run it weight-only: set input_activations to null in the "
            "quantization_config of its config.json"
        )
    return _keep_scale(f"{name}_input", matrix.input_global_scale, matrix.packed.device)


def quantize_input(x: Tensor, packed: Packed, name: str, expert: int | None = None) -> Tensor:
    """Return x [M, K] as the scheme has the input of this matrix: quantized and dequantized, or x itself."""
    activations = packed.problem.scheme.activations
    if activations is None:
        return x
    return fake_quantize(x, activations, global_scale=_scale(packed, f"{name}_input", expert))


def _keep_scale(name: str, multiplier: Tensor | None, device: torch.device) -> dict[str, Tensor]:
    if multiplier is None:
        return {}
    scale = GlobalScale.of(multiplier, device)
    return {f"{name}_divisor": scale.divisor, f"{name}_table": scale.table}


def _scale(packed: Packed, name: str, expert: int | None) -> GlobalScale | None:
    if f"{name}_table" not in packed.tensors:
        return None
    divisor, table = packed[f"{name}_divisor"], packed[f"{name}_table"]
    return GlobalScale(divisor, table) if expert is None else GlobalScale(divisor[expert], table[expert])
