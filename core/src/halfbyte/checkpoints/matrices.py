"""Find the FP4 matrices of dialects that store each module's tensors under the module's name. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from halfbyte.checkpoints.headers import TensorInfo, read_floats
from halfbyte.checkpoints.sources import Found, MatrixSource, place
from halfbyte.formats import Format
from halfbyte.schemes import Scheme

#: E8M0 is stored under either name.
SCALE_DTYPES: Final = {"e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0")}
FLOATS: Final = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """What a dialect calls the tensors of a module, and whether its global scales are divisors or multipliers."""

    packed: str
    scales: str
    global_scale: str
    input_global_scale: str
    divisors: bool


def find_matrices(
    tensors: Mapping[str, TensorInfo], spelling: Spelling, scheme_of: Callable[[str, TensorInfo], Scheme]
) -> Found:
    """Every module with packed values. `scheme_of` takes a module's path and packed tensor, and may refuse it."""
    scalars = _read_scalars(tensors, spelling)
    matrices, used, ignored = [], set[str](), set[str]()
    for name, packed in tensors.items():
        module, _, role = name.rpartition(".")
        # Where quantized and unquantized weights have the same name, the dtype tells them apart.
        if role != spelling.packed or (role == "weight" and packed.dtype != "U8"):
            continue
        scheme = scheme_of(module, packed)
        roles = {role: name, **_partners(tensors, module, spelling, scheme, packed)}
        matrices.append(_matrix(tensors, module, roles, spelling, scheme, scalars))
        used.update(roles.values())
        if scheme.activations is None:
            ignored.add(f"{module}.{spelling.input_global_scale}")
    return Found(tuple(matrices), frozenset(used), frozenset(ignored & tensors.keys()))


def check_scales(scales: TensorInfo, shape: tuple[int, ...], fmt: Format) -> None:
    """CheckpointError unless the block scales have this shape and a dtype of the format."""
    if scales.shape != shape:
        per = f"{fmt} has a scale for each {fmt.group_size} columns"
        raise scales.error(f"has shape {list(scales.shape)}, expected {list(shape)}: {per}")
    if scales.dtype not in SCALE_DTYPES[fmt.scale]:
        raise scales.error(f"is {scales.dtype}, but {fmt} scales are {' or '.join(SCALE_DTYPES[fmt.scale])}")


def check_bias(bias: TensorInfo | None, shape: tuple[int, ...]) -> None:
    """CheckpointError unless the bias, if there is one, has this shape and is floating point."""
    if bias is not None and (bias.shape != shape or bias.dtype not in FLOATS):
        raise bias.error(f"is {bias.dtype} {list(bias.shape)}, expected floating point {list(shape)}")


def _read_scalars(tensors: Mapping[str, TensorInfo], spelling: Spelling) -> dict[str, tuple[float, ...]]:
    names = (spelling.global_scale, spelling.input_global_scale)
    scalars = (info for name, info in tensors.items() if name.rpartition(".")[2] in names and info.dtype == "F32")
    return read_floats(scalars)


def _partners(
    tensors: Mapping[str, TensorInfo], module: str, spelling: Spelling, scheme: Scheme, packed: TensorInfo
) -> dict[str, str]:
    """Role to name of the tensors that belong to the packed values of a module."""
    roles = [spelling.scales]
    if scheme.weights.has_global_scale:
        roles.append(spelling.global_scale)
        if scheme.activations is not None:
            roles.append(spelling.input_global_scale)
    for role in roles:
        if f"{module}.{role}" not in tensors:
            raise packed.error(f"its partner {f'{module}.{role}'!r} is missing ({scheme} needs it)")
    if f"{module}.bias" in tensors:
        roles.append("bias")
    return {role: f"{module}.{role}" for role in roles}


def _matrix(
    tensors: Mapping[str, TensorInfo],
    module: str,
    roles: Mapping[str, str],
    spelling: Spelling,
    scheme: Scheme,
    scalars: Mapping[str, tuple[float, ...]],
) -> MatrixSource:
    packed, scales = tensors[roles[spelling.packed]], tensors[roles[spelling.scales]]
    bias = tensors[roles["bias"]] if "bias" in roles else None
    if packed.dtype != "U8" or len(packed.shape) != 2 or 0 in packed.shape:
        raise packed.error(f"is {packed.dtype} {list(packed.shape)}, expected U8 [N, K/2]")
    (n, half), group = packed.shape, scheme.weights.group_size
    if half * 2 % group:
        raise packed.error(f"K={half * 2} is not a multiple of {scheme.weights}'s group of {group}")
    check_scales(scales, (n, half * 2 // group), scheme.weights)
    check_bias(bias, (n,))

    def multiplier(role: str) -> float | None:
        if role not in roles:
            return None
        info = tensors[roles[role]]
        return _multiplier(info, scalars.get(info.name), divisor=spelling.divisors)

    layer, role, expert = place(module, packed)
    return MatrixSource(
        name=module,
        layer=layer,
        role=role,
        expert=expert,
        scheme=scheme,
        n=n,
        k=half * 2,
        packed=packed,
        scales=scales,
        global_scale=multiplier(spelling.global_scale),
        input_global_scale=multiplier(spelling.input_global_scale),
        bias=bias,
    )


def _multiplier(info: TensorInfo, values: tuple[float, ...] | None, *, divisor: bool) -> float:
    if not values:
        raise info.error(f"is {info.dtype} {list(info.shape)}, expected one F32 value")
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise info.error(f"is {value}; a global scale must be positive and finite (was it ever calibrated?)")
    if len(set(values)) > 1:
        raise info.error(
            f"has {len(values)} different values {list(values[:4])}; which rows each of them belongs to is not stored"
        )
    return 1.0 / values[0] if divisor else values[0]
