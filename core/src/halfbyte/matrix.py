"""A matrix of FP4 numbers as a checkpoint means it, with one convention for all formats.

Packed values are uint8 [N, K/2], the low nibble is the even column. Scales are linear (not swizzled): NVFP4
float8_e4m3fn [N, K/16], MXFP4 E8M0 as uint8 [N, K/32]. Global scales are multipliers in float64: the reciprocal of a
stored float32 divisor loses nothing there, so that dequantization stays exact for both conventions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.formats import Format

SCALE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}
#: From the smallest E4M3 number, 2**-9, to the largest power of two, 2**8.
_E4M3_EXPONENTS = 17


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrix:
    """One FP4 matrix [N, K], or a stack of them [E, N, K], as a checkpoint stores it.

    Raises CheckpointError naming the tensor for a wrong shape or dtype, block scales that are NaN or negative, and
    global scales that are zero, negative, not finite or were never loaded.
    """

    #: What the checkpoint calls it; error messages use it.
    name: str
    format: Format
    #: uint8 [..., N, K/2]
    packed: Tensor
    #: float8_e4m3fn or uint8 (E8M0) [..., N, K/group_size]
    scales: Tensor
    #: float64 multipliers on the CPU: [parts] of a matrix, [E] of a stack; None for MXFP4.
    global_scale: Tensor | None = None
    #: The same for the activations; None where activations have no calibrated scale.
    input_global_scale: Tensor | None = None
    #: [..., N], floating point
    bias: Tensor | None = None
    #: Rows of each part with a global scale of its own, top to bottom; () means one part.
    part_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_layout(self)
        _check_block_scales(self)
        _check_global_scales(self)

    @property
    def n(self) -> int:
        """Output features, N."""
        return self.packed.shape[-2]

    @property
    def k(self) -> int:
        """Input features, K."""
        return self.packed.shape[-1] * 2

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that there is."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value

    def to(self, device: torch.device | str) -> Matrix:
        """The same matrix with packed values, scales and bias on `device`; global scales stay on the CPU.

        Itself where nothing moves: checking the numbers once more would wait for the device.
        """
        packed, scales = self.packed.to(device), self.scales.to(device)
        bias = None if self.bias is None else self.bias.to(device)
        if packed is self.packed and scales is self.scales and bias is self.bias:
            return self
        return replace(self, packed=packed, scales=scales, bias=bias)

    def padded(self, n: int, k: int) -> Matrix:
        """The same matrix with zero rows and columns appended up to [n, k]; the codes are zero, so the result is."""
        if (n, k) == (self.n, self.k):
            return self
        group = self.format.group_size
        bias = None if self.bias is None else _zero_padded(self.bias, (n,))
        rows = self.part_rows and (*self.part_rows[:-1], self.part_rows[-1] + n - self.n)
        return replace(
            self,
            packed=_zero_padded(self.packed, (n, k // 2)),
            scales=_zero_padded(self.scales, (n, k // group)),
            bias=bias,
            part_rows=rows,
        )

    def parts(self) -> list[Matrix]:
        """One matrix for each run of rows with the same global scales, top to bottom: views, nothing is copied."""
        if not self.part_rows:
            return [self]
        result, start = [], 0
        for first, stop in _equal_runs(self):
            rows = slice(start, start + sum(self.part_rows[first:stop]))
            result.append(
                replace(
                    self,
                    packed=self.packed[rows],
                    scales=self.scales[rows],
                    global_scale=_one_of(self.global_scale, first),
                    input_global_scale=_one_of(self.input_global_scale, first),
                    bias=None if self.bias is None else self.bias[rows],
                    part_rows=(),
                )
            )
            start = rows.stop
        return result

    def row_global_scales(self) -> Tensor | None:
        """The global scale of every row, float64 [N] on the CPU; None for MXFP4."""
        if self.global_scale is None:
            return None
        return self.global_scale.repeat_interleave(torch.tensor(self.part_rows or (self.n,)))


def same_scale(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two global scales are equal, or both absent."""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def times_power_of_two(scales: Tensor, exponent: int) -> Tensor | None:
    """E4M3 block scales times 2**exponent, or None where one would round, overflow or vanish.

    Only all-zero scales could take more than E4M3's whole range of exponents; they are not looked for.
    """
    if abs(exponent) > _E4M3_EXPONENTS:
        return None
    exact = scales.to(torch.float32) * 2.0**exponent
    result = exact.to(torch.float8_e4m3fn)
    return result if torch.equal(result.to(torch.float32), exact) else None


def _zero_padded(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    # Byte-sized floats have no F.pad; all-zero bytes are zero (E4M3) or irrelevant beside zero codes (E8M0).
    lead = tensor.shape[: tensor.ndim - len(sizes)]
    padded = tensor.new_empty(*lead, *sizes)
    (padded.view(torch.uint8) if padded.element_size() == 1 else padded).zero_()
    corner = padded
    for dim, size in enumerate(tensor.shape):
        corner = corner.narrow(dim, 0, size)
    corner.copy_(tensor)
    return padded


def _one_of(scales: Tensor | None, index: int) -> Tensor | None:
    return None if scales is None else scales[index : index + 1]


def _equal_runs(matrix: Matrix) -> list[tuple[int, int]]:
    """[first, stop) of the runs of parts whose global scales are all equal."""

    def key(part: int) -> tuple[float, ...]:
        both = (matrix.global_scale, matrix.input_global_scale)
        return tuple(scales[part].item() for scales in both if scales is not None)

    runs = [(0, 1)]
    for part in range(1, len(matrix.part_rows)):
        if key(part) == key(runs[-1][0]):
            runs[-1] = (runs[-1][0], part + 1)
        else:
            runs.append((part, part + 1))
    return runs


def _check_layout(matrix: Matrix) -> None:
    fmt, packed = matrix.format, matrix.packed
    if packed.dtype != torch.uint8 or packed.ndim not in (2, 3):
        raise CheckpointError(
            f"{matrix.name}: packed values are {packed.dtype} {list(packed.shape)}, expected uint8 [N, K/2]"
        )
    if matrix.k % fmt.group_size:
        raise CheckpointError(f"{matrix.name}: K={matrix.k} is not a multiple of {fmt}'s group of {fmt.group_size}")
    lead = tuple(packed.shape[:-1])
    for what, tensor, shape in (
        ("scales", matrix.scales, (*lead, matrix.k // fmt.group_size)),
        ("bias", matrix.bias, lead),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise CheckpointError(f"{matrix.name}: {what} have shape {list(tensor.shape)}, expected {list(shape)}")
    if matrix.scales.dtype != SCALE_DTYPES[fmt.scale]:
        raise CheckpointError(
            f"{matrix.name}: {fmt} scales are {matrix.scales.dtype}, expected {SCALE_DTYPES[fmt.scale]}"
        )
    for tensor in matrix.tensors():
        if tensor.is_meta:
            raise CheckpointError(f"{matrix.name}: a tensor {list(tensor.shape)} was never loaded")
    if matrix.part_rows and sum(matrix.part_rows) != matrix.n:
        raise CheckpointError(f"{matrix.name}: parts of {matrix.part_rows} rows do not add up to N={matrix.n}")


def _check_block_scales(matrix: Matrix) -> None:
    raw = matrix.scales.view(torch.uint8)
    e4m3 = {"NaN": (raw & 0x7F) == 0x7F, "negative": raw > 0x80}
    faults = e4m3 if matrix.format.scale == "e4m3" else {"NaN": raw == 0xFF}
    for fault, found in faults.items():
        if bool(found.any()):
            where = found.nonzero()[0].tolist()
            raise CheckpointError(f"{matrix.name}: {int(found.sum())} block scales are {fault}, the first at {where}")


def _check_global_scales(matrix: Matrix) -> None:
    count = matrix.packed.shape[0] if matrix.packed.ndim == 3 else max(1, len(matrix.part_rows))
    if matrix.format.has_global_scale != (matrix.global_scale is not None):
        has = "needs a global scale and has none" if matrix.global_scale is None else "has a global scale, unlike its"
        raise CheckpointError(f"{matrix.name}: {has} format {matrix.format}")
    for what, scales in (("global scale", matrix.global_scale), ("input global scale", matrix.input_global_scale)):
        if scales is None:
            continue
        if scales.dtype != torch.float64 or scales.device.type != "cpu" or tuple(scales.shape) != (count,):
            raise CheckpointError(
                f"{matrix.name}: {what} is {scales.dtype} {list(scales.shape)} on {scales.device}, "
                f"expected float64 [{count}] on cpu"
            )
        bad = ~(scales.isfinite() & (scales > 0))
        if bool(bad.any()):
            raise CheckpointError(
                f"{matrix.name}: {what} is {scales[bad][0].item()}; it must be positive and finite "
                "(was it ever calibrated or loaded?)"
            )
