"""Discovery of plugins by entry point. Every failure is a row of the answer, never a crash."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import pluggy

from halfbyte import hookspecs
from halfbyte.errors import PluginError, UsageError, nearest
from halfbyte.hookspecs import GROUP, hookimpl
from halfbyte.specs import API_VERSION, KernelSpec

__all__ = [
    "BUILT_IN",
    "Plugin",
    "available_kernels",
    "disabled_names",
    "discover",
    "hookimpl",
    "installed_plugins",
    "kernels_of",
    "unknown_disabled",
]

BUILT_IN: Final = "halfbyte"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One plugin found. With an `error` it has no kernels; `details` is the traceback, where there is one."""

    name: str
    distribution: str
    version: str
    target: str
    kernels: tuple[KernelSpec, ...] = ()
    error: str = ""
    details: str = ""
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a plugin comes from: what metadata says, and how to import it."""

    name: str
    distribution: str
    version: str
    target: str
    load: Callable[[], Any]


@cache
def installed_plugins() -> tuple[Plugin, ...]:
    """Discover once for this process, as the environment says: HALFBYTE_DISABLE_PLUGINS and HALFBYTE_STRICT."""
    strict = os.environ.get("HALFBYTE_STRICT", "0") or "0"
    if strict not in ("0", "1"):
        raise UsageError(f"environment HALFBYTE_STRICT is {strict!r}; write 0 or 1")
    return discover(entry_points(group=GROUP), disabled=disabled_names(os.environ), strict=strict == "1")


def available_kernels() -> list[tuple[str, KernelSpec]]:
    """(plugin name, kernel) of every plugin installed; UsageError for a plugin disabled that there is not."""
    plugins = installed_plugins()
    for fault in unknown_disabled(os.environ, plugins):
        raise UsageError(fault)
    return kernels_of(plugins)


def kernels_of(plugins: Iterable[Plugin]) -> list[tuple[str, KernelSpec]]:
    """(plugin name, kernel) of every plugin given."""
    return [(plugin.name, spec) for plugin in plugins for spec in plugin.kernels]


def disabled_names(environ: Mapping[str, str]) -> set[str]:
    """The plugins that HALFBYTE_DISABLE_PLUGINS names."""
    return {name.strip() for name in environ.get("HALFBYTE_DISABLE_PLUGINS", "").split(",") if name.strip()}


def unknown_disabled(environ: Mapping[str, str], plugins: Iterable[Plugin]) -> list[str]:
    """A line with the nearest match for every plugin disabled that there is not."""
    known = {plugin.name for plugin in plugins}
    return [
        f"environment HALFBYTE_DISABLE_PLUGINS: no plugin {name!r}{nearest(name, known)}"
        for name in sorted(disabled_names(environ) - known)
    ]


def discover(points: Iterable[EntryPoint], *, disabled: Iterable[str] = (), strict: bool = False) -> tuple[Plugin, ...]:
    """Load the built-in plugin and those behind the entry points, in the order of their names.

    A plugin that cannot be imported, declares nonsense, asks for another API version or takes a name or kernel id that
    is taken already is returned with its error; under `strict` that raises PluginError.
    """
    found: list[Plugin] = []
    for source in _sources(points):
        plugin = _disabled(source) if source.name in disabled else _guarded(source, found)
        if strict and plugin.error and not plugin.disabled:
            raise PluginError(f"plugin {plugin.name!r} ({plugin.distribution} {plugin.version}): {plugin.error}")
        found.append(plugin)
    return tuple(found)


def _sources(points: Iterable[EntryPoint]) -> list[_Source]:
    from halfbyte.reference import plugin as built_in

    sources = [
        _Source(
            name=point.name,
            distribution=point.dist.name if point.dist else "unknown",
            version=point.dist.version if point.dist else "",
            target=point.value,
            load=point.load,
        )
        for point in points
    ]
    sources.sort(key=lambda source: (source.name, source.distribution))
    own = _Source(BUILT_IN, "halfbyte", _own_version(), built_in.__name__, lambda: built_in)
    return [own, *sources]


def _own_version() -> str:
    from importlib.metadata import version

    return version("halfbyte")


def _guarded(source: _Source, before: Sequence[Plugin]) -> Plugin:
    try:
        kernels = _kernels_of(source, before)
    except (Exception, SystemExit) as error:  # somebody else's code: whatever it raises is a row
        return _row(source, error=f"{type(error).__name__}: {error}", details=traceback.format_exc())
    return _row(source, kernels=kernels)


def _disabled(source: _Source) -> Plugin:
    return _row(source, error="disabled by HALFBYTE_DISABLE_PLUGINS", disabled=True)


def _row(source: _Source, **fields: Any) -> Plugin:
    return Plugin(
        name=source.name, distribution=source.distribution, version=source.version, target=source.target, **fields
    )


def _kernels_of(source: _Source, before: Sequence[Plugin]) -> tuple[KernelSpec, ...]:
    for plugin in before:
        if plugin.name == source.name:
            raise PluginError(f"its name is taken by {plugin.distribution} {plugin.version}; uninstall one of the two")
    module = source.load()
    # A manager of its own for each plugin: what one of them raises cannot touch another.
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(module, name=source.name)
    manager.check_pending()
    _check_version(manager.hook.halfbyte_api_version())
    answers = manager.hook.halfbyte_kernels()
    if not answers:
        raise PluginError("it has no hook halfbyte_kernels marked with halfbyte.plugins.hookimpl")
    kernels = tuple(answers[0])
    _check_kernels(kernels, before)
    return kernels


def _check_version(answers: Sequence[int]) -> None:
    if not answers:
        raise PluginError("it has no hook halfbyte_api_version marked with halfbyte.plugins.hookimpl")
    if answers[0] != API_VERSION:
        raise PluginError(
            f"it was written for version {answers[0]} of the plugin API and this halfbyte has version {API_VERSION}; "
            "install releases of the two that fit together"
        )


def _check_kernels(kernels: Sequence[KernelSpec], before: Sequence[Plugin]) -> None:
    taken = {(spec.id, spec.op): plugin for plugin in before for spec in plugin.kernels}
    seen: set[tuple[str, str]] = set()
    for spec in kernels:
        if not isinstance(spec, KernelSpec):
            raise PluginError(f"halfbyte_kernels returned {spec!r}, which is no KernelSpec")
        key = (spec.id, spec.op)
        if key in taken:
            owner = taken[key]
            raise PluginError(
                f"kernel id {spec.id!r} ({spec.op}) is taken by plugin {owner.name!r} of {owner.distribution}"
            )
        if key in seen:
            raise PluginError(f"it declares kernel {spec.id!r} ({spec.op}) twice")
        seen.add(key)
