"""The kit as a pytest plugin: options, the cases of the kernels asked for, the environment, the report."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from halfbyte.conformance import cases
from halfbyte.conformance.environment import Environment, probed
from halfbyte.conformance.report import Report
from halfbyte.errors import nearest
from halfbyte.plugins import installed_plugins
from halfbyte.specs import KernelSpec

_HERE: Final = Path(__file__).parent
_REPORT: Final = pytest.StashKey[Report]()
_NAME: Final = "halfbyte.conformance"

for _module in ("subject", "test_declaration", "test_linear", "test_experts", "test_prepare", "test_operators"):
    pytest.register_assert_rewrite(f"{_NAME}.{_module}")


def _each(spec: KernelSpec) -> Iterator[KernelSpec]:
    yield spec


#: What a check asks for by the name of an argument: the op it is about, and its cases.
_CASES: Final[dict[str, tuple[str, Callable[[KernelSpec], Iterator[Any]]]]] = {
    "spec": ("", _each),
    "linear_case": ("linear", cases.linear_cases),
    "linear_setting": ("linear", cases.linear_settings),
    "linear_scheme": ("linear", lambda spec: cases.one_of_each_scheme(cases.linear_settings(spec))),
    "experts_case": ("experts", cases.experts_cases),
    "experts_scheme": ("experts", cases.experts_settings),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --kernel, --device and --report."""
    group = parser.getgroup("halfbyte", "halfbyte conformance kit")
    group.addoption("--kernel", action="append", default=[], metavar="ID", help="the kernel to try; may be repeated")
    group.addoption(
        "--device", metavar="NAME", help='where to run it: "cpu", "cuda:1", ... (default: as halfbyte does)'
    )
    group.addoption("--report", type=Path, metavar="FILE.json", help="write every check's outcome there")


def pytest_configure(config: pytest.Config) -> None:
    """Look up the kernels; a usage error for an id that no plugin declares."""
    wanted = config.getoption("kernel")
    if not wanted and any(_NAME in argument or str(_HERE) in argument for argument in config.args):
        raise pytest.UsageError("say which kernel the conformance kit shall try: --kernel ID")
    plugins = installed_plugins()
    known = {spec.id for plugin in plugins for spec in plugin.kernels}
    for kernel_id in wanted:
        if kernel_id not in known:
            failed = "".join(f"; plugin {plugin.name!r} failed: {plugin.error}" for plugin in plugins if plugin.error)
            raise pytest.UsageError(f"no kernel {kernel_id!r}{nearest(kernel_id, known)}{failed}")
    own = tuple((plugin, spec) for plugin in plugins for spec in plugin.kernels if spec.id in wanted)
    config.stash[_REPORT] = Report(kernels=own)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every check of the kit its cases; none to a check about an op that the kernel does not have."""
    if metafunc.definition.path.parent != _HERE:
        return
    for name, (op, make) in _CASES.items():
        if name in metafunc.fixturenames:
            specs = [spec for _, spec in metafunc.config.stash[_REPORT].kernels if op in ("", spec.op)]
            found = [case for spec in specs for case in make(spec)]
            ids = [f"{case.id}-{case.op}" if isinstance(case, KernelSpec) else case.name for case in found]
            metafunc.parametrize(name, found or [None], ids=ids or ["none"], indirect=op != "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop the checks without cases."""
    empty = [item for item in items if _is_empty(item)]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if not _is_empty(item)]


def _is_empty(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or item.path.parent != _HERE:
        return False
    callspec = getattr(item, "callspec", None)
    return callspec is not None and any(callspec.params.get(name, name) is None for name in _CASES)


@pytest.fixture(scope="session")
def kernel_environment(pytestconfig: pytest.Config) -> Environment:
    """Where the kernel runs: the probed device, or --device.

    A plugin's own pytest plugin overrides this fixture to run the kit over a contract double of its vendor's library:
    it installs the double and returns the described machine with the device that the double computes on.
    """
    return probed(pytestconfig.getoption("device"))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Note the environment for the report."""
    value = yield
    if fixturedef.argname == "kernel_environment" and isinstance(value, Environment):
        request.config.stash[_REPORT].environment = value
    return value


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note why a check failed, was skipped or passed; pytest makes its own report besides."""
    if item.path.parent == _HERE:
        item.config.stash[_REPORT].note(item.name, call)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report."""
    path: Path | None = session.config.getoption("report")
    if path is not None:
        session.config.stash[_REPORT].write(path)
