"""The grammar of demands, and the order in which they come."""

import pytest

from halfbyte import policies
from halfbyte.errors import UsageError
from halfbyte.policies import VARIABLES, Policy, Rule, current_policies, from_environment, parse_rules


def test_rules_are_globs_optionally_for_some_schemes():
    assert parse_rules("nvfp4-*=marlin.*, reference ,") == (Rule("marlin.*", "nvfp4-*"), Rule("reference"))
    assert parse_rules(["a.b", "mxfp4-w4a4=c"]) == (Rule("a.b"), Rule("c", "mxfp4-w4a4"))


def test_a_rule_matches_by_kernel_and_scheme():
    (rule,) = parse_rules("nvfp4-*=marlin.*")
    assert rule.matches("marlin.triton", "nvfp4-w4a16")
    assert not rule.matches("marlin.triton", "mxfp4-w4a16")
    assert not rule.matches("reference", "nvfp4-w4a16")


@pytest.mark.parametrize(
    ("text", "message"), [("nvfp5-*=a", "nvfp5"), ("=a", "cannot read"), ("mxfp4-w4a4=", "cannot read")]
)
def test_a_rule_that_makes_no_sense_is_an_error(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse_rules(text)


def test_every_demand_can_come_from_the_environment():
    policy = from_environment(
        {
            "HALFBYTE_REQUIRE": "a",
            "HALFBYTE_PREFER": "b,c",
            "HALFBYTE_DENY": "d",
            "HALFBYTE_FIDELITY": "weight-only",
            "HALFBYTE_ACTIVATIONS": "allow-quantized",
            "PATH": "/bin",
        }
    )
    assert (policy.require, policy.deny) == ((Rule("a"),), (Rule("d"),))
    assert policy.prefer == (Rule("b"), Rule("c"))
    assert (policy.fidelity, policy.activations) == ("weight-only", "allow-quantized")
    assert policy.named("require") == "environment HALFBYTE_REQUIRE"


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("HALFBYTE_REQIRE", "a", "HALFBYTE_REQUIRE"),
        ("HALFBYTE_FIDELITY", "emulatd", "emulated"),
        ("HALFBYTE_ACTIVATIONS", "allow-quantised", "allow-quantized"),
        ("HALFBYTE_WEIGHTS", "packed", "known|mean"),
    ],
)
def test_an_unknown_variable_or_value_names_the_nearest(name: str, value: str, near: str):
    with pytest.raises(UsageError, match=near):
        from_environment({name: value})


def test_demands_are_ordered_argument_then_inner_context_then_outer_then_environment(monkeypatch):
    monkeypatch.setenv("HALFBYTE_DENY", "d")
    with policies.policy(require="outer"), policies.policy(require="inner"):
        stack = current_policies(Policy(require="argument"))
    assert [str(*p.require) for p in stack[:3]] == ["argument", "inner", "outer"]
    assert [p.origin for p in stack] == ["argument", "context manager", "context manager", "environment"]
    assert len(current_policies()) == 1


def test_a_context_manager_ends_with_its_block_even_on_an_error():
    with pytest.raises(ZeroDivisionError), policies.policy(deny="a"):
        raise ZeroDivisionError
    assert [p.origin for p in current_policies()] == ["environment"]


def test_every_variable_says_what_it_does():
    assert all(VARIABLES.values())
