"""Calls of vLLM's operators by the names of their arguments, since releases differ in which arguments there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from halfbyte.errors import PluginError
from halfbyte_cuda_marlin.vllm.library import operator

#: vLLM's ScalarType.float4_e2m1f.id.
FLOAT4_E2M1F: Final = 562949953487106


class Call:
    """An operator with most arguments settled; takes the others by position, in the order of `given`."""

    def __init__(self, target: Any, settled: Sequence[Any], places: Sequence[int]) -> None:
        self._target = target
        self._settled = list(settled)
        self._places = tuple(places)

    def __call__(self, *given: Any) -> Any:
        """Call the operator."""
        arguments = self._settled.copy()
        for place, value in zip(self._places, given, strict=True):
            arguments[place] = value
        return self._target(*arguments)


def call(name: str, given: Sequence[str], fixed: Mapping[str, Any], former: Mapping[str, Any] | None = None) -> Call:
    """Prepare to call the operator of this name.

    `given` are the arguments of each call, `fixed` the others that it must have, `former` those that only some releases
    have. PluginError if the installed release lacks one it must have, or needs one that is not known here.
    """
    target = operator(name)
    return Call(target, *arrange(target._schema, given, fixed, former or {}))


def arrange(
    schema: Any, given: Sequence[str], fixed: Mapping[str, Any], former: Mapping[str, Any]
) -> tuple[list[Any], list[int]]:
    """(the value of every argument in the schema's order, None for those given; the places of those given)."""
    names = [argument.name for argument in schema.arguments]
    lacking = [name for name in (*given, *fixed) if name not in names]
    if lacking:
        raise _misfit(schema, f"no argument {', '.join(lacking)}")
    known = {**dict.fromkeys(given), **fixed, **former}
    unknown = [a.name for a in schema.arguments if a.name not in known and not a.has_default_value()]
    if unknown:
        raise _misfit(schema, f"the argument {', '.join(unknown)}, which is not known here")
    settled = [known.get(argument.name, argument.default_value) for argument in schema.arguments]
    return settled, [names.index(name) for name in given]


def _misfit(schema: Any, what: str) -> PluginError:
    return PluginError(
        f"vllm's operator has {what}: {schema}. This version of halfbyte-cuda-marlin was made for vllm 0.26 to 0.33: "
        "install one of these, or a newer halfbyte-cuda-marlin"
    )
