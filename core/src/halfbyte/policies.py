"""Policies: what the user demands of the choice, and where each demand came from.

Demands come from call arguments, the context manager `policy`, and the environment, highest first. One grammar
everywhere: kernel ids with globs, each optionally for some schemes only, separated by commas:

    HALFBYTE_REQUIRE="nvfp4-*=marlin.*,mxfp4-w4a4=reference"
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Final, Literal, TypeAlias, get_args

from halfbyte.errors import UsageError, nearest
from halfbyte.extras import EXTRAS
from halfbyte.schemes import SCHEMES
from halfbyte.specs import Fidelity

PREFIX: Final = "HALFBYTE_"
#: Every environment variable there is, and what it does.
VARIABLES: Final = {
    "HALFBYTE_REQUIRE": "kernels of which one must run, or it is an error",
    "HALFBYTE_PREFER": "kernels to try first, in this order",
    "HALFBYTE_DENY": "kernels that must not run",
    "HALFBYTE_FIDELITY": f"the worst fidelity allowed: {', '.join(Fidelity)}",
    "HALFBYTE_ACTIVATIONS": "exact (default), or allow-quantized: a weight-only checkpoint may quantize activations",
    "HALFBYTE_DISABLE_PLUGINS": "names of plugins that are not loaded",
    "HALFBYTE_STRICT": "1: a plugin that fails is an error instead of a row in `halfbyte doctor`",
}

#: The origin of the one demand that no user made: weights stay packed where the model would not fit otherwise.
MEMORY: Final = "memory"

Activations: TypeAlias = Literal["exact", "allow-quantized"]
Weights: TypeAlias = Literal["auto", "packed", "dequantized"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A glob of kernel ids, for the schemes that another glob names."""

    kernels: str
    schemes: str = "*"

    def matches(self, kernel_id: str, scheme: str) -> bool:
        """Whether the rule is about this kernel running this scheme."""
        return fnmatchcase(kernel_id, self.kernels) and self.concerns(scheme)

    def concerns(self, scheme: str) -> bool:
        """Whether the rule is about this scheme at all."""
        return fnmatchcase(scheme, self.schemes)

    def __str__(self) -> str:
        return self.kernels if self.schemes == "*" else f"{self.schemes}={self.kernels}"


Rules: TypeAlias = str | Iterable[str] | tuple[Rule, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What one source demands. None and () mean that it says nothing. Texts are parsed by the grammar above."""

    require: Rules = ()
    prefer: Rules = ()
    deny: Rules = ()
    fidelity: Fidelity | str | None = None
    activations: Activations | None = None
    weights: Weights | None = None
    #: Where the demands come from, as `decided_by` names it: "argument", "context manager", "environment" or MEMORY.
    origin: str = "argument"

    def __post_init__(self) -> None:
        for name in ("require", "prefer", "deny"):
            object.__setattr__(self, name, parse_rules(getattr(self, name), self.named(name)))
        if self.fidelity is not None:
            object.__setattr__(self, "fidelity", _one_of(Fidelity, self.fidelity, self.named("fidelity")))
        _one_of(get_args(Activations), self.activations, self.named("activations"))
        _one_of(get_args(Weights), self.weights, self.named("weights"))

    def rules(self, demand: Literal["require", "prefer", "deny"], scheme: str) -> tuple[Rule, ...]:
        """The rules of one demand that concern this scheme."""
        return tuple(rule for rule in getattr(self, demand) if rule.concerns(scheme))

    def named(self, demand: str) -> str:
        """How messages and `decided_by` name one demand: "argument require", "environment HALFBYTE_REQUIRE"."""
        if self.origin == MEMORY:
            return self.origin
        return f"{self.origin} {PREFIX + demand.upper() if self.origin == 'environment' else demand}"


def parse_rules(rules: Rules, where: str = "rules") -> tuple[Rule, ...]:
    """Parse the grammar of this module; UsageError naming `where` and the nearest match for an unknown scheme."""
    texts = rules.split(",") if isinstance(rules, str) else rules
    if isinstance(rules, str) and rules and not rules.strip(", "):
        raise UsageError(f"{where}: {rules!r} names no kernel")
    return tuple(
        text if isinstance(text, Rule) else _parse_rule(text.strip(), where)
        for text in texts
        if isinstance(text, Rule) or text.strip()
    )


def _parse_rule(text: str, where: str) -> Rule:
    schemes, equals, kernels = text.rpartition("=")
    if not kernels or (equals and not schemes):
        raise UsageError(f"{where}: cannot read {text!r}; write KERNEL or SCHEME=KERNEL, globs allowed")
    if equals and not any(fnmatchcase(scheme, schemes) for scheme in SCHEMES):
        raise UsageError(f"{where}: no scheme matches {schemes!r}{nearest(schemes, SCHEMES)}")
    return Rule(kernels.strip(), schemes.strip() or "*")


def _one_of(known: Iterable[str], value: str | None, where: str) -> str | None:
    names = {str(name): name for name in known}
    if value is None or value in names:
        return value if value is None else names[value]
    raise UsageError(f"{where}: unknown value {value!r}{nearest(value, names)}")


_stack: ContextVar[tuple[Policy, ...]] = ContextVar("halfbyte_policies", default=())


@contextmanager
def policy(
    *,
    require: Rules = (),
    prefer: Rules = (),
    deny: Rules = (),
    fidelity: str | None = None,
    activations: Activations | None = None,
    weights: Weights | None = None,
) -> Iterator[Policy]:
    """Demand something of every choice made inside the `with` block, above the environment.

    `require`, `prefer`, `deny`: kernel ids with globs, comma-separated text or a list. `fidelity`: the worst one
    allowed. `activations`: "exact" or "allow-quantized". `weights`: "auto", "packed" or "dequantized".
    As with every context variable, threads that are started inside the block do not see it.
    """
    demands = Policy(
        require=require,
        prefer=prefer,
        deny=deny,
        fidelity=fidelity,
        activations=activations,
        weights=weights,
        origin="context manager",
    )
    token = _stack.set((demands, *_stack.get()))
    try:
        yield demands
    finally:
        _stack.reset(token)


def current_policies(argument: Policy | None = None) -> tuple[Policy, ...]:
    """All demands in force here, highest first: the argument, the context managers inside out, the environment."""
    return (*(() if argument is None else (argument,)), *_stack.get(), from_environment(os.environ))


def from_environment(environ: Mapping[str, str]) -> Policy:
    """Read the demands from environment variables; an unknown variable with our prefix is a UsageError."""
    unknown = unknown_variables(environ)
    if unknown:
        raise UsageError("; ".join(f"unknown environment variable {name}{near}" for name, near in unknown.items()))
    demands = {
        field.name: environ[PREFIX + field.name.upper()]
        for field in fields(Policy)
        if environ.get(PREFIX + field.name.upper()) and PREFIX + field.name.upper() in VARIABLES
    }
    return Policy(**demands, origin="environment")  # type: ignore[arg-type]  # texts, checked by Policy itself


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables with our prefix that mean nothing, each with its nearest match."""
    ours = (name for name in environ if name.startswith(PREFIX) and name not in VARIABLES)
    return {name: nearest(name, VARIABLES) for name in sorted(ours)}


def check_known(policies: Sequence[Policy], kernel_ids: Iterable[str]) -> None:
    """UsageError with the nearest match for a rule whose glob matches no known kernel id."""
    known = sorted(set(kernel_ids))
    for demands in policies:
        for demand in ("require", "prefer", "deny"):
            for rule in parse_rules(getattr(demands, demand)):
                if not any(fnmatchcase(kernel_id, rule.kernels) for kernel_id in known):
                    raise UsageError(
                        f"{demands.named(demand)}: no kernel matches {rule.kernels!r}{nearest(rule.kernels, known)}"
                        f"{_install_hint(rule.kernels)}"
                    )


def _install_hint(glob: str) -> str:
    lines = [extra.install for extra in EXTRAS if glob.startswith(extra.prefix)]
    return f". `halfbyte doctor` shows the plugins that are here; {lines[0]} brings this one" if lines else ""
