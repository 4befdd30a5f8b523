"""Signatures of functions whose modules cannot be imported without CuTe DSL, read from the wheel's source."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any


@functools.cache
def signature(source: str, name: str) -> inspect.Signature:
    """The signature of a function of a file of the wheel; defaults are only known to be there."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("flashinfer")
    tree = ast.parse((Path(spec.origin).parent / source).read_text(encoding="utf-8"))
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    arguments, kinds = found.args, inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    parameters = [
        kinds(node.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if place < required else None)
        for place, node in enumerate(plain)
    ]
    parameters += [
        kinds(node.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        for node, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return inspect.Signature(parameters)


def checked(double: Callable[..., Any], source: str, name: str) -> Callable[..., Any]:
    """The double, called only with what the real function takes."""
    real = signature(source, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return double(**real.bind(*args, **kwargs).arguments)

    return call
