"""What `halfbyte doctor` finds: this Python, its devices, torch, plugins, kernels and our environment variables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from halfbyte.errors import NO_TORCH, UsageError
from halfbyte.extras import EXTRAS, Extra
from halfbyte.machines import Machine, matches
from halfbyte.plugins import Plugin, installed_plugins, kernels_of, unknown_disabled
from halfbyte.policies import PREFIX, VARIABLES, check_known, from_environment, unknown_variables
from halfbyte.probe import Device, TorchBuild, devices, torch_build
from halfbyte.reports import Table, proofs_text
from halfbyte.specs import KernelSpec
from halfbyte.units import size_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything found. `faults` has one line for each thing to mend; `missing` is (device name, our plugin)."""

    devices: tuple[Device, ...]
    torch: TorchBuild | None
    plugins: tuple[Plugin, ...]
    missing: tuple[tuple[str, Extra], ...]
    variables: dict[str, str]
    faults: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing has to be mended."""
        return not self.faults

    @property
    def kernels(self) -> list[tuple[str, KernelSpec]]:
        """(plugin name, kernel) of every plugin that loaded."""
        return kernels_of(self.plugins)


def examine(environ: Mapping[str, str] = os.environ) -> Diagnosis:
    """Look at this machine and environment. Imports no torch and no vendor's code."""
    plugins, found = installed_plugins(), devices()
    missing = missing_plugins(found, plugins)
    return Diagnosis(
        devices=found,
        torch=torch_build(),
        plugins=plugins,
        missing=missing,
        variables={name: value for name, value in sorted(environ.items()) if name.startswith(PREFIX)},
        faults=(*_plugin_faults(plugins), *_variable_faults(environ, plugins), *_torch_faults(found)),
    )


def missing_plugins(found: Sequence[Device], plugins: Sequence[Plugin]) -> tuple[tuple[str, Extra], ...]:
    """Our plugins that are not installed though hardware for them is there."""
    there = {plugin.distribution for plugin in plugins}
    return tuple(
        (device.name, extra)
        for device in found
        if device.arch
        for extra in EXTRAS
        if extra.distribution not in there
        and any(matches(pattern, Machine(name=device.name, arch=device.arch)) for pattern in extra.devices)
    )


def diagnosis_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as JSON-ready data."""
    torch = diagnosis.torch
    return {
        "halfbyte": version("halfbyte"),
        "python": platform.python_version(),
        "os": platform.platform(),
        "devices": [asdict(device) for device in diagnosis.devices],
        "torch": None if torch is None else asdict(torch),
        "plugins": [_plugin_data(plugin) for plugin in diagnosis.plugins],
        "missing": [
            {"device": device, "distribution": extra.distribution, "install": extra.install}
            for device, extra in diagnosis.missing
        ],
        "kernels": [_kernel_data(plugin, spec) for plugin, spec in diagnosis.kernels],
        "environment": diagnosis.variables,
        "faults": list(diagnosis.faults),
    }


def diagnosis_tables(diagnosis: Diagnosis) -> list[Table]:
    """The diagnosis as tables."""
    torch = diagnosis.torch
    facts = [
        ("halfbyte", version("halfbyte")),
        ("python", platform.python_version()),
        ("os", platform.platform()),
        ("torch", "not installed" if torch is None else f"{torch.version}, built for {torch.backend}"),
    ]
    device_rows = [
        (
            d.name,
            d.arch or "not known",
            d.product,
            "-" if d.memory is None else size_text(d.memory),
            d.driver or "-",
            d.note or "-",
        )
        for d in diagnosis.devices
    ]
    plugin_rows = [
        (p.name, f"{p.distribution} {p.version}", _status(p), str(len(p.kernels)), p.error or "-")
        for p in diagnosis.plugins
    ]
    plugin_rows += [
        (extra.name, extra.distribution, "missing", "-", f"{device} is there: {extra.install}")
        for device, extra in diagnosis.missing
    ]
    return [
        Table("", ("", ""), facts),
        Table("devices", ("device", "arch", "product", "memory", "driver", "note"), device_rows),
        Table("plugins", ("plugin", "distribution", "status", "kernels", "note"), plugin_rows),
        Table(
            "kernels",
            ("kernel", "op", "plugin", "devices", "schemes", "proof"),
            [_kernel_row(plugin, spec) for plugin, spec in diagnosis.kernels],
        ),
        Table("environment variables", ("variable", "value"), list(diagnosis.variables.items())),
        Table("to mend", ("",), [(line,) for line in diagnosis.faults]),
    ]


def _status(plugin: Plugin) -> str:
    if plugin.disabled:
        return "disabled"
    return "failed" if plugin.error else "ok"


def _plugin_data(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "target": plugin.target,
        "status": _status(plugin),
        "error": plugin.error,
        "details": plugin.details,
        "kernels": [spec.id for spec in plugin.kernels],
    }


def _kernel_data(plugin: str, spec: KernelSpec) -> dict[str, Any]:
    return {
        "kernel": spec.id,
        "op": spec.op,
        "plugin": plugin,
        "devices": list(spec.devices),
        "schemes": dict(spec.schemes),
        "requires": list(spec.requires),
        "proof": {pattern: proof.value for pattern, proof in spec.proofs},
        "auto": spec.auto,
    }


def _kernel_row(plugin: str, spec: KernelSpec) -> tuple[str, ...]:
    return spec.id, spec.op, plugin, " ".join(spec.devices), " ".join(spec.schemes), proofs_text(spec)


def _plugin_faults(plugins: Sequence[Plugin]) -> list[str]:
    return [
        f"plugin {plugin.name} ({plugin.distribution} {plugin.version}) failed: {plugin.error}"
        for plugin in plugins
        if _status(plugin) == "failed"
    ]


def _variable_faults(environ: Mapping[str, str], plugins: Sequence[Plugin]) -> list[str]:
    faults = [f"unknown environment variable {name}{near}" for name, near in unknown_variables(environ).items()]
    known = {name: value for name, value in environ.items() if name in VARIABLES}
    try:
        check_known([from_environment(known)], (spec.id for _, spec in kernels_of(plugins)))
    except UsageError as error:
        faults.append(str(error))
    return [*faults, *unknown_disabled(environ, plugins)]


def _torch_faults(found: Sequence[Device]) -> list[str]:
    build = torch_build()
    if build is None:
        return [f"nothing can run, only planning works: {NO_TORCH}"]
    undriven = [device for device in found if device.arch and device.name != "cpu" and not build.drives(device)]
    if any(build.drives(device) for device in found if device.name != "cpu"):
        return []
    return [
        f"{device.name} ({device.product}) is there, but torch {build.version} is built for {build.backend}; "
        "https://pytorch.org has the install line of a build for it"
        for device in undriven
    ]
