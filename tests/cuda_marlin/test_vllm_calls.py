"""Arguments by name, for the schemas of every release recorded."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from halfbyte.errors import PluginError
from halfbyte_cuda_marlin.vllm import calls, experts, linear
from support.vllm_double import FLOAT4_E2M1F, SCHEMAS

EVERY = [(release, name) for release, schemas in SCHEMAS.items() for name in schemas]


def schema_of(release: str, name: str, **changes: str) -> Any:
    text = SCHEMAS[release][name]
    for old, new in changes.items():
        text = text.replace(old, new)
    return torch._C.parse_schema(text)


def named(schema: Any, given: Mapping[str, Any], fixed: Mapping[str, Any], former: Mapping[str, Any]) -> dict[str, Any]:
    """What the operator gets, by name."""
    seen: list[Any] = []
    settled, places = calls.arrange(schema, list(given), fixed, former)
    calls.Call(lambda *arguments: seen.extend(arguments), settled, places)(*given.values())
    return {argument.name: value for argument, value in zip(schema.arguments, seen, strict=True)}


@pytest.mark.parametrize(
    ("release", "more"), [("0.26.0", {"g_idx_or_none", "perm_or_none", "is_k_full"}), ("0.33.0", set())]
)
def test_the_linear_operator_gets_every_argument_under_its_name(release: str, more: set[str]):
    given = {name: object() for name in linear._GIVEN}
    found = named(schema_of(release, "_C::marlin_gemm"), given, linear.FIXED, linear._FORMER)
    expected = {
        **given,
        "c_or_none": None,
        "b_bias_or_none": None,
        "a_scales": None,
        "b_zeros_or_none": None,
        "b_type_id": FLOAT4_E2M1F,
        "use_atomic_add": False,
        "use_fp32_reduce": True,
        "is_zp_float": False,
    }
    former = {"g_idx_or_none": None, "perm_or_none": None, "is_k_full": True}
    assert found == {**expected, **{name: former[name] for name in more}}


@pytest.mark.parametrize("release", sorted(SCHEMAS))
def test_the_experts_operator_gets_its_own_choice_of_tiles(release: str):
    given = {name: object() for name in experts._GIVEN}
    schema = schema_of(release, "_moe_C::moe_wna16_marlin_gemm")
    found = named(schema, given, {**linear.FIXED, **experts._TILES}, experts._FORMER)
    assert {name: found[name] for name in given} == given
    assert [found[name] for name in ("thread_k", "thread_n", "blocks_per_sm")] == [-1, -1, -1]
    assert ("is_full_k" in found) == (release == "0.26.0")


def test_what_has_a_default_and_is_not_known_keeps_its_default():
    schema = schema_of("0.33.0", "_C::swigluoai_and_mul")
    assert named(schema, {"out": 1, "input": 2}, {}, {}) == {"out": 1, "input": 2, "alpha": 1.702, "limit": 7.0}


def test_an_argument_that_is_needed_and_not_known_is_an_error():
    schema = schema_of("0.33.0", "_C::marlin_gemm", **{"Tensor workspace": "Tensor workspace, Tensor b_sums"})
    with pytest.raises(PluginError, match=r"has the argument b_sums, which is not known here: marlin_gemm\(.*install"):
        calls.arrange(schema, linear._GIVEN, linear.FIXED, linear._FORMER)


@pytest.mark.parametrize("name", ["global_scale", "b_type_id"])
def test_an_argument_that_is_gone_is_an_error(name: str):
    schema = schema_of("0.26.0", "_C::marlin_gemm", **{f" {name}": " renamed"})
    with pytest.raises(PluginError, match=rf"has no argument {name}: marlin_gemm"):
        calls.arrange(schema, linear._GIVEN, linear.FIXED, linear._FORMER)


def test_a_call_leaves_nothing_behind_for_the_next():
    seen: list[tuple[Any, ...]] = []
    call = calls.Call(lambda *arguments: seen.append(arguments), [None, 1, None], [2, 0])
    call("a", "b")
    call("c", "d")
    assert seen == [("b", 1, "a"), ("d", 1, "c")]
