"""Group the matrices of a checkpoint into layers, and pose each layer's problem. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from halfbyte.checkpoints.configs import Config
from halfbyte.checkpoints.sources import LayerPlan, MatrixSource, Role
from halfbyte.errors import UsageError
from halfbyte.problems import ExpertsProblem, InputScales, LinearProblem

#: Names in configurations of transformers models, and what problems call these functions.
_ACTIVATIONS: Final[Mapping[str, str]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
_TOP_K: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
)
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
#: alpha and limit of the swigluoai activation, which kernels take as constants.
_SWIGLU: Final = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def build_layers(matrices: Iterable[MatrixSource], config: Config, dtype: str) -> tuple[LayerPlan, ...]:
    """One plan for each layer, in the order of the model; CheckpointError for experts that do not fit together."""
    grouped: dict[str, list[MatrixSource]] = {}
    for source in matrices:
        grouped.setdefault(source.layer, []).append(source)
    return tuple(_layer(name, grouped[name], config, dtype) for name in sorted(grouped, key=natural))


def _layer(name: str, sources: Sequence[MatrixSource], config: Config, dtype: str) -> LayerPlan:
    first = sources[0]
    if first.role == "weight":
        problem = LinearProblem(scheme=first.scheme, n=first.n, k=first.k, dtype=dtype, bias=first.bias is not None)
        return LayerPlan(name, problem, {"weight": (first,)})
    return _experts(name, sources, config, dtype)


def _experts(name: str, sources: Sequence[MatrixSource], config: Config, dtype: str) -> LayerPlan:
    activation = _activation(config)
    gated = activation != "relu2"
    roles = _by_role(name, sources, config, gated=gated, activation=activation)
    up, down = roles["up"][0], roles["down"][0]
    shapes = {"gate": (up.n, up.k), "up": (up.n, up.k), "down": (up.k, up.n)}
    for source in sources:
        _check_alike(source, up, shapes[source.role])
    top_k = config.integer(*_TOP_K)
    if top_k is None:
        raise config.error(f"does not say how many experts serve a token (one of {', '.join(_TOP_K)})")
    if top_k > len(roles["up"]):
        raise config.error(f"{name}: {top_k} experts serve a token, but there are only {len(roles['up'])}")
    try:
        problem = ExpertsProblem(
            scheme=up.scheme,
            experts=len(roles["up"]),
            top_k=top_k,
            hidden=up.k,
            intermediate=down.k,
            dtype=dtype,
            activation=activation,
            bias=up.bias is not None,
            shared_global_scale=shared_global_scale(roles),
            input_scales=input_scales(roles),
        )
    except UsageError as error:
        raise config.error(f"{name}: {error}") from error
    return LayerPlan(name, problem, roles)


def shared_global_scale(roles: Mapping[Role, Sequence[MatrixSource]]) -> bool | None:
    """Whether one global scale can serve gate and up of each expert; None where only the block scales can tell.

    A ratio of two powers of two can be folded into E4M3 block scales unless they overflow or underflow.
    """
    result: bool | None = True
    for gate, up in zip(roles.get("gate", ()), roles["up"], strict=False):
        if gate.input_global_scale != up.input_global_scale:
            return False
        if gate.global_scale is None or up.global_scale is None or gate.global_scale == up.global_scale:
            continue
        if math.frexp(gate.global_scale)[0] != math.frexp(up.global_scale)[0]:
            return False
        result = None
    return result


def input_scales(roles: Mapping[Role, Sequence[MatrixSource]]) -> InputScales | None:
    """Which experts share input scales; None if a matrix has none."""
    of_x = {source.input_global_scale for role in roles if role != "down" for source in roles[role]}
    hidden = {source.input_global_scale for source in roles["down"]}
    if None in of_x | hidden:
        return None
    if len(of_x) > 1:
        return "per-expert"
    return "one" if len(hidden) == 1 else "one-for-x"


def _by_role(
    name: str, sources: Sequence[MatrixSource], config: Config, *, gated: bool, activation: str
) -> dict[Role, tuple[MatrixSource, ...]]:
    """Role to sources in the order of the experts, complete: 0 to the number that the configuration says."""
    by_role: dict[Role, dict[int, MatrixSource]] = {}
    for source in sources:
        experts = by_role.setdefault(source.role, {})
        number = -1 if source.expert is None else source.expert
        if number in experts:
            raise source.packed.error(f"is the {source.role} of expert {number}, as is {experts[number].packed.name!r}")
        experts[number] = source
    if "gate" in by_role and not gated:
        raise next(iter(by_role["gate"].values())).packed.error(f"is a gate, but the activation {activation} has none")
    stated = config.integer(*_EXPERTS)
    if stated is not None and stated < 1:
        raise config.error(f"says that there are {stated} experts; at least one is expected")
    count = 1 + max(max(experts) for experts in by_role.values()) if stated is None else stated
    result: dict[Role, tuple[MatrixSource, ...]] = {}
    wanted: tuple[Role, ...] = ("gate", "up", "down") if gated else ("up", "down")
    for role in wanted:
        experts = by_role.get(role, {})
        extra = sorted(number for number in experts if number >= count)
        if missing := count - (len(experts) - len(extra)):
            first = next(number for number in range(count) if number not in experts)
            raise sources[0].packed.error(
                f"{name} has {count} experts, but the packed {role} of expert {first} is missing ({missing} in all)"
            )
        if extra:
            raise experts[extra[0]].packed.error(
                f"is of expert {extra[0]}, but {config.file.name} says {count} experts"
            )
        result[role] = tuple(experts[number] for number in range(count))
    return result


def _check_alike(source: MatrixSource, up: MatrixSource, shape: tuple[int, int]) -> None:
    if (source.n, source.k) != shape:
        raise source.packed.error(
            f"{source.role} of an expert is {[source.n, source.k]}, but up is {[up.n, up.k]}: expected {list(shape)}"
        )
    if source.scheme != up.scheme:
        raise source.packed.error(f"is {source.scheme}, but {up.packed.name!r} of the same experts is {up.scheme}")
    if (source.bias is None) != (up.bias is None):
        has, other = (source, up) if up.bias is None else (up, source)
        raise other.packed.error(f"has no bias, but {has.name!r} of the same experts has one")
    if source.bias is not None and up.bias is not None and source.bias.dtype != up.bias.dtype:
        raise source.bias.error(f"is {source.bias.dtype}, but {up.bias.name!r} is {up.bias.dtype}")


def _activation(config: Config) -> str:
    """The experts' activation function; gpt-oss's is known by its model type, since hidden_act says silu there too."""
    if config.text("model_type") == "gpt_oss":
        for key, value in _SWIGLU.items():
            if (found := config.value(key)) not in (None, value):
                raise config.error(f"{key} is {found!r}; kernels have {value}")
        return "swigluoai"
    if (limit := config.value("swiglu_limit")) is not None:
        raise config.error(
            f"swiglu_limit is {limit!r}; experts with a clamped activation are supported for gpt_oss only"
        )
    name = config.text("hidden_act", "hidden_activation", "mlp_hidden_act")
    activation = _ACTIVATIONS.get(name or "")
    if activation is None:
        raise config.error(f"the experts' activation is {name!r}; supported are {', '.join(_ACTIVATIONS)}")
    return activation
