"""A double of humming-kernels 0.1.19 that computes in plain torch on the CPU, and checks what the library checks.

`humming_signatures.json` was read from the wheel's source: every call must bind to it.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from halfbyte import describe
from halfbyte.conformance.environment import Environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIGNATURES: dict[str, dict[str, str | None]] = json.loads(
    Path(__file__).with_name("humming_signatures.json").read_text(encoding="utf-8")
)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
SCALES = {"float8e4m3": torch.float8_e4m3fn, "float8e8m0": torch.float8_e8m0fnu}


class DoubleError(AssertionError):
    """Humming would have refused this, or done something else than is asked for."""


def expect(true: object, what: str) -> None:
    """DoubleError unless it is true."""
    if not true:
        raise DoubleError(what)


def bound(name: str, positional: tuple[Any, ...], named: dict[str, Any]) -> SimpleNamespace:
    """The arguments of a call by name, bound to the wheel's signature."""
    signature = SIGNATURES[name]
    given = dict(zip(signature, positional, strict=False)) | named
    expect(len(given) == len(positional) + len(named) and given.keys() <= signature.keys(), f"{name}: {sorted(given)}")
    missing = [key for key, default in signature.items() if default is None and key not in given]
    expect(not missing, f"{name}: {missing} missing")
    defaults = {key: json.loads(_json(default)) for key, default in signature.items() if default is not None}
    return SimpleNamespace(**(defaults | given))


def _json(default: str) -> str:
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(default, default.replace("'", '"'))


class LayerConfig(SimpleNamespace):
    """What humming compiles kernels for."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**vars(bound("humming.config.LayerConfig", (), named)))
        expect(self.a_dtype == self.c_dtype in ("bfloat16", "float16"), "activations of 16 bits")
        expect((self.b_dtype, self.weight_scale_type) == ("float4e2m1", "group"), "E2M1 in groups")
        expect(self.pad_shape_n % 8 == 0, "pad_shape[1] % 8 == 0")
        expect(self.pad_shape_k % 8 == 0, "pad_shape[2] % (128 // a_dtype.num_bits) == 0")

    def to_str(self) -> str:
        return json.dumps(vars(self))


def transform_humming_tensors(*positional: Any, **named: Any) -> dict[str, Tensor]:
    call = bound("humming.transform.transform_humming_tensors", positional, named)
    config, tensors = call.config, call.tensors
    lead = (config.num_experts,) if config.num_experts else ()
    n, k, group = config.shape_n, config.shape_k, config.weight_scale_group_size
    if not call.already_padded:
        n, k = n - config.pad_shape_n, k - config.pad_shape_k
    wanted = {
        "weight": ((*lead, n, k // 8), torch.int32),
        "weight_scale": ((*lead, n, k // group), SCALES[config.bs_dtype]),
        "weight_scale_2": (lead or (1,), torch.float32),
    }
    if config.has_bias:
        wanted["bias"] = ((*lead, n), getattr(torch, config.a_dtype))
    for name, (shape, dtype) in wanted.items():
        expect((tuple(tensors[name].shape), tensors[name].dtype) == (shape, dtype), f"{name}: {tensors[name].shape}")
        expect(tensors[name].is_contiguous(), f"{name}.is_contiguous()")
    codes = tensors["weight"].view(*lead, n, k // 16, 2).transpose(-3, -2).reshape(*lead, k // 16, n * 2)
    scale = tensors["weight_scale"].view(torch.uint8).transpose(-1, -2).contiguous()
    result = {"weight": codes.clone(), "weight_scale": scale.view(SCALES[config.bs_dtype])}
    return result | {name: tensors[name].clone() for name in ("weight_scale_2", "bias") if name in wanted}


def prepare_fp16_e8m0_scale(*positional: Any, **named: Any) -> tuple[Any, dict[str, Tensor]]:
    call = bound("humming.transform.prepare_fp16_e8m0_scale", positional, named)
    return call.config, call.tensors


def get_heuristics_config(*positional: Any, **named: Any) -> dict[str, Any]:
    call = bound("humming.tune.get_heuristics_config", positional, named)
    expect(isinstance(call.shape_m, int), "one number of rows")
    rows = 8 if call.shape_m <= 8 else 16
    return {"block_shape": (rows, 128, 64), "warp_shape": (rows, 32, 64), "use_stream_k": True}


class HummingKernel:
    """Compiled kernels by number."""

    made: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []  # noqa: RUF012

    @classmethod
    def prepare_kernels(cls, *positional: Any, **named: Any) -> Tensor:
        call = bound("humming.kernel.humming.HummingKernel.prepare_kernels", positional, named)
        layer, compute, tuning = (json.loads(getattr(call, f"{of}_config")) for of in ("layer", "compute", "tuning"))
        numbers: list[int] = []
        for above, end, config in tuning:
            bound("humming.config.TuningConfig", (), config)
            for size, block in zip((layer["shape_n"], layer["shape_k"]), config["block_shape"][1:], strict=True):
                expect(size % block == 0, "problem_shape % block_shape == 0")
            numbers += [above, end, len(cls.made), 0]
            cls.made.append((layer, compute, config))
        return torch.tensor(numbers, dtype=torch.int64)


def launch_kernel(*positional: Any, **named: Any) -> Tensor:
    call = bound("humming.ops.launch_kernel", positional, named)
    rows = call.valid_shape_m or call.inputs.shape[0]
    ranges = call.configs.view(-1, 4).tolist()
    layer, compute, config = next(HummingKernel.made[i] for above, end, i, _ in ranges if above < rows <= end)
    expect(call.locks is not None or not config["use_stream_k"], "locks must not be none if use_stream_k")
    n, k = layer["shape_n"] - layer["pad_shape_n"], layer["shape_k"] - layer["pad_shape_k"]
    x = call.inputs
    expect(x.shape[1:] == (k,) and x.is_contiguous() and x.data_ptr() % 16 == 0, f"a: {x.shape}")
    expect(x.dtype == getattr(torch, layer["a_dtype"]), f"a: {x.dtype}")
    expect(call.bias is not None or not layer["has_bias"], "bias must not be none if has_bias")
    weights = dequantized(layer, call)[..., :n, :k]
    if not layer["num_experts"]:
        expect(compute["gemm_type"] == "dense", "gemm_type")
        return (x.double() @ weights.T).to(x.dtype)
    expect(compute["gemm_type"] == "grouped_contiguous", "gemm_type")
    starts = call.expert_layout
    expect((starts.shape, starts.dtype) == ((layer["num_experts"] + 1,), torch.int32), "expert_token_offset")
    y = torch.full((len(x), n), torch.nan, dtype=x.dtype)
    for expert, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        y[start:end] = (x[start:end].double() @ weights[expert].T).to(x.dtype)
        if layer["has_bias"]:
            y[start:end] += call.bias[expert, :n]
    return y


def dequantized(layer: dict[str, Any], call: SimpleNamespace) -> Tensor:
    """Float64 [..., N, K] of packed tensors, padding included."""
    n, k = layer["shape_n"], layer["shape_k"]
    words = call.weight.view(*call.weight.shape[:-2], k // 16, n, 2).transpose(-3, -2)
    codes = words.contiguous().view(torch.uint8).reshape(*call.weight.shape[:-2], n, k // 2)
    values = E2M1[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()]
    expect(call.weight_scale.dtype == SCALES[layer["bs_dtype"]], f"bs: {call.weight_scale.dtype}")
    scales = call.weight_scale.double().transpose(-1, -2).repeat_interleave(layer["weight_scale_group_size"], dim=-1)
    return values * scales * call.weight_scale_2.double().view(*call.weight.shape[:-2], 1, 1)


def modules() -> dict[str, ModuleType]:
    """The modules of humming that are imported, by name."""
    contents: dict[str, dict[str, object]] = {
        "humming.config": {"LayerConfig": LayerConfig},
        "humming.transform": {
            "transform_humming_tensors": transform_humming_tensors,
            "prepare_fp16_e8m0_scale": prepare_fp16_e8m0_scale,
        },
        "humming.tune": {"get_heuristics_config": get_heuristics_config},
        "humming.kernel.humming": {"HummingKernel": HummingKernel},
        "humming.ops": {"launch_kernel": launch_kernel},
    }
    made = {}
    for name, content in {"humming": {}, "humming.kernel": {}, **contents}.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content)
    return made


def install(set_item: Callable[[Any, str, Any], None], set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Put the double in the library's place, and a card with 132 processors in the place of none."""
    for name, module in modules().items():
        set_item(sys.modules, name, module)
    set_attribute(torch.cuda, "device", lambda _: nullcontext())
    set_attribute(torch.cuda, "get_device_capability", lambda _: (9, 0))
    set_attribute(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))


@pytest.fixture(scope="session")
def kernel_environment() -> Iterator[Environment]:
    with pytest.MonkeyPatch.context() as patch:
        install(patch.setitem, patch.setattr)
        yield Environment(describe("sm_90"), torch.device("cpu"))
