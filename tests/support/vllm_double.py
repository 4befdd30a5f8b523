"""vLLM's operators on the CPU, under the schemas of its wheels, with Marlin's layouts read back place by place.

Where a thread of the kernel finds the scales and biases of its columns is written down here by arithmetic on indices,
what their bits mean by the formats of the registers they are put into. Codes are kept in an order of this file's own:
the operators that repack and read them are both vLLM's.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.formats import E2M1_VALUES
from halfbyte.reference.activations import activate

#: Release to operator to schema, as the strings in the libraries of the wheels have them.
SCHEMAS: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("vllm_schemas.json").read_text(encoding="utf-8")
)
#: vllm.scalar_type.scalar_types.float4_e2m1f.id
FLOAT4_E2M1F = 562949953487106
_E2M1 = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float64)


@contextmanager
def installed(release: str) -> Iterator[None]:
    """The operators of a release, registered with torch."""
    libraries = {}
    for name, schema in SCHEMAS[release].items():
        namespace, _, short = name.partition("::")
        if namespace not in libraries:
            libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        libraries[namespace].define(schema)
        libraries[namespace].impl(short, _by_name(schema, globals()[short]), "CPU")
    try:
        yield
    finally:
        for library in libraries.values():
            library._destroy()


def _by_name(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    arguments = torch._C.parse_schema(schema).arguments

    def run(*positional: Any, **named: Any) -> Any:
        given = {a.name: a.default_value for a in arguments if a.has_default_value()}
        given |= {a.name: value for a, value in zip(arguments, positional, strict=False)}
        return function(**given, **named)

    return run


def gptq_marlin_repack(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, **_: Any) -> Tensor:
    assert b_q_weight.dtype == torch.int32
    assert b_q_weight.is_contiguous()
    assert tuple(b_q_weight.shape) == (size_k // 8, size_n)
    assert num_bits == 4
    _check_sizes(size_n, size_k)
    codes = torch.stack([b_q_weight >> 4 * place & 15 for place in range(8)], dim=1).reshape(size_k, size_n)
    pairs = (codes[0::2] | codes[1::2] << 4).to(torch.uint8)
    return pairs.reshape(-1).view(torch.int32).reshape(size_k // 16, 2 * size_n)


def marlin_gemm(
    a: Tensor, b_q_weight: Tensor, b_scales: Tensor, size_m: int, size_n: int, size_k: int, **rest: Any
) -> Tensor:
    _check_call(b_scales, rest)
    assert tuple(a.shape) == (size_m, size_k)
    assert a.is_contiguous()
    weight = _weight(b_q_weight, b_scales, size_n, size_k, a.dtype)
    values = a.double() @ weight.T
    global_scale = rest["global_scale"]
    return (values if global_scale is None else values * global_scale.double()).to(a.dtype)


def moe_wna16_marlin_gemm(
    a: Tensor,
    b_q_weight: Tensor,
    b_scales: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_past_padded: Tensor,
    topk_weights: Tensor,
    moe_block_size: int,
    top_k: int,
    mul_topk_weights: bool,
    size_m: int,
    size_n: int,
    size_k: int,
    **rest: Any,
) -> Tensor:
    _check_call(b_scales, rest)
    assert tuple(a.shape) == (size_m, size_k)
    assert moe_block_size in (8, 16, 32, 48, 64)
    slots, bias, global_scale = size_m * top_k, rest["b_bias_or_none"], rest["global_scale"]
    result = torch.full((slots, size_n), float("nan"), dtype=a.dtype)
    used = expert_ids[: int(num_tokens_past_padded) // moe_block_size].tolist()
    weights = {e: _weight(b_q_weight[e], b_scales[e], size_n, size_k, a.dtype).T for e in set(used)}
    for block, expert in enumerate(used):
        own = sorted_token_ids[block * moe_block_size : (block + 1) * moe_block_size].long()
        own = own[own < slots]
        values = a[own // top_k].double() @ weights[expert]
        if bias is not None:
            values += bias[expert][_bias_places(size_n)].double()
        if global_scale is not None:  # vLLM 0.26 has it so: after the bias
            values *= global_scale[expert].double()
        if mul_topk_weights:
            values *= topk_weights.view(-1)[own].to(a.dtype).double()[:, None]
        result[own] = values.to(a.dtype)
    return result


def moe_align_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    maybe_expert_map: Tensor | None,
    **_: Any,
) -> None:
    assert topk_ids.dtype == torch.int32
    ids, places, blocks = topk_ids.view(-1), [], []
    for expert in range(num_experts):
        local = expert if maybe_expert_map is None else int(maybe_expert_map[expert])
        own = (ids == expert).nonzero().view(-1).tolist() if local >= 0 else []
        while own:
            places += (own[:block_size] + [ids.numel()] * block_size)[:block_size]
            blocks.append(local)
            own = own[block_size:]
    sorted_token_ids.fill_(ids.numel())
    sorted_token_ids[: len(places)] = torch.tensor(places, dtype=torch.int32)
    experts_ids[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    num_tokens_post_pad.fill_(len(places))


def moe_sum(input: Tensor, output: Tensor, topk_ids: Tensor, expert_map: Tensor) -> None:  # noqa: A002
    here = (expert_map[topk_ids.long()] >= 0)[:, :, None]
    output.copy_(torch.where(here, input.double(), 0.0).sum(1))


def silu_and_mul(result: Tensor, input: Tensor) -> None:  # noqa: A002
    result.copy_(activate("silu", *input.chunk(2, dim=1)))


def gelu_tanh_and_mul(out: Tensor, input: Tensor) -> None:  # noqa: A002
    out.copy_(activate("gelu_tanh", *input.chunk(2, dim=1)))


def swigluoai_and_mul(out: Tensor, input: Tensor, alpha: float, limit: float) -> None:  # noqa: A002
    assert (alpha, limit) == (1.702, 7.0)
    out.copy_(activate("swigluoai", input[:, 0::2], input[:, 1::2]))


def _weight(words: Tensor, scales: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """[N, K] as the products see it, before the global scale."""
    _check_sizes(n, k)
    assert tuple(words.shape) == (k // 16, 2 * n)
    assert scales.shape[1] == n
    assert scales.is_contiguous()
    pairs = words.contiguous().view(torch.uint8).reshape(k // 2, n).long()
    codes = torch.stack((pairs & 15, pairs >> 4), dim=1).reshape(k, n)
    group, values = k // scales.shape[0], _E2M1[codes]
    if scales.dtype == torch.float8_e8m0fnu:
        assert (group, dtype) == (32, torch.bfloat16), "E8M0 scales are for MXFP4 in bfloat16"
        numbers = torch.exp2(scales.view(torch.uint8).double() - 127)
    else:
        assert group == 16
        values = values * (2.0**-126 if dtype == torch.bfloat16 else 2.0**-14)
        numbers = _in_registers(scales.view(torch.uint8), dtype)
    exact = values.view(-1, group, n) * numbers[:, _scale_places(n)][:, None, :]
    return exact.to(dtype).double().view(k, n).T


def _in_registers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that bytes of NVFP4 scales become: all eight bits are exponent and mantissa, none is a sign."""
    wide = codes.to(torch.int32)
    bits = wide << 7 if dtype == torch.float16 else (wide & 0x80) << 7 | (wide & 0x7F) << 4
    return bits.to(torch.int16).view(dtype).double()


def _scale_places(n: int) -> Tensor:
    """Where the scale of each column is: thread g of eight has columns g, g + 8, ..., g + 56 of 64, in words of four.

    A word's bytes 0 and 2 make the first pair of 16-bit numbers, bytes 1 and 3 the second.
    """
    column = torch.arange(n)
    order = column // 64 * 64 + column % 8 * 8 + column % 64 // 8
    return order // 4 * 4 + torch.tensor([0, 2, 1, 3])[order % 4]


def _bias_places(n: int) -> Tensor:
    """Where the bias of each column is: thread i of four has columns 2i and 2i + 1 of each eight, for 32 in a row."""
    column = torch.arange(n)
    return column // 32 * 32 + column % 8 // 2 * 8 + column % 32 // 8 * 2 + column % 2


def _check_sizes(n: int, k: int) -> None:
    assert (n % 64, k % 128) == (0, 0) or (n % 128, k % 64) == (0, 0), f"no tiles for {n}x{k}"


def _check_call(scales: Tensor, rest: dict[str, Any]) -> None:
    assert rest["b_type_id"] == FLOAT4_E2M1F
    assert not rest["use_atomic_add"]
    assert rest["use_fp32_reduce"]
    locks, global_scale = rest["workspace"], rest["global_scale"]
    assert locks.dtype == torch.int32
    assert not locks.any()
    assert (global_scale is None) == (scales.dtype == torch.float8_e8m0fnu)
    assert global_scale is None or global_scale.dtype == torch.float32
