"""Discovery: whatever a plugin does wrong is a row, and the others load all the same."""

import re
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from halfbyte.errors import PluginError
from halfbyte.plugins import BUILT_IN, Plugin, discover, hookimpl, unknown_disabled
from halfbyte.specs import API_VERSION
from support.specs import kernel


@pytest.fixture
def entry_point(monkeypatch):
    """Make an entry point to a module with these attributes."""

    def make(name: str, **attributes: Any) -> EntryPoint:
        module = ModuleType(f"plugin_{name}")
        for key, value in attributes.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return EntryPoint(name=name, value=module.__name__, group="halfbyte")

    return make


def hooks(*kernels: Any, api: int = API_VERSION) -> dict[str, Any]:
    """The two hooks of a plugin."""

    @hookimpl
    def halfbyte_api_version() -> int:
        return api

    @hookimpl
    def halfbyte_kernels() -> tuple[Any, ...]:
        return kernels

    return {"halfbyte_api_version": halfbyte_api_version, "halfbyte_kernels": halfbyte_kernels}


def by_name(plugins: tuple[Plugin, ...]) -> dict[str, Plugin]:
    return {plugin.name: plugin for plugin in plugins}


def test_the_built_in_plugin_is_always_there():
    (plugin,) = discover(())
    assert (plugin.name, plugin.error) == (BUILT_IN, "")
    assert {spec.id for spec in plugin.kernels} == {"reference", "dequantized"}


def test_a_plugin_adds_its_kernels(entry_point):
    found = by_name(discover([entry_point("card", **hooks(kernel("card.fast")))]))
    assert [spec.id for spec in found["card"].kernels] == ["card.fast"]


@hookimpl
def raising() -> None:
    raise OSError("libvendor.so.3: cannot open shared object file")


@hookimpl
def leaving() -> None:
    raise SystemExit("no driver")


@hookimpl
def halfbyte_kernel_list() -> tuple[()]:
    return ()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "halfbyte_api_version"),
        ({"halfbyte_api_version": hooks()["halfbyte_api_version"]}, "halfbyte_kernels"),
        (hooks(api=99), "version 99"),
        (hooks("not a spec"), "no KernelSpec"),
        (hooks(kernel("a"), kernel("a")), "twice"),
        (hooks(kernel("reference")), "'reference'.*taken by plugin 'halfbyte'"),
        ({**hooks(), "halfbyte_kernels": raising}, "libvendor"),
        ({**hooks(), "halfbyte_kernels": leaving}, "no driver"),
        ({**hooks(), "halfbyte_kernel_list": halfbyte_kernel_list}, "unknown hook"),
    ],
)
def test_a_plugin_that_declares_nonsense_is_a_row_and_the_others_load(entry_point, attributes, message: str):
    good = entry_point("zz_good", **hooks(kernel("good.one")))
    found = by_name(discover([entry_point("bad", **attributes), good]))
    assert found["bad"].kernels == ()
    assert re.search(message, found["bad"].error)
    assert [spec.id for spec in found["zz_good"].kernels] == ["good.one"]


def test_a_plugin_that_cannot_be_imported_is_a_row_with_its_traceback():
    missing = EntryPoint(name="gone", value="no_such_module_of_ours", group="halfbyte")
    found = by_name(discover([missing]))["gone"]
    assert "no_such_module_of_ours" in found.error
    assert "Traceback" in found.details


def test_two_plugins_with_one_kernel_id_keep_the_first_and_name_both(entry_point):
    points = [entry_point("b", **hooks(kernel("same.id"))), entry_point("a", **hooks(kernel("same.id")))]
    found = by_name(discover(points))
    assert [spec.id for spec in found["a"].kernels] == ["same.id"]
    assert "'a'" in found["b"].error


def test_two_plugins_with_one_name_keep_the_first(entry_point):
    point = entry_point("a", **hooks(kernel("one")))
    _, first, second = discover([point, point])
    assert (first.error, second.kernels) == ("", ())
    assert "name is taken" in second.error


def test_a_disabled_plugin_is_not_even_imported():
    gone = EntryPoint(name="gone", value="no_such_module_of_ours", group="halfbyte")
    found = by_name(discover([gone], disabled=["gone"]))["gone"]
    assert found.disabled
    assert "HALFBYTE_DISABLE_PLUGINS" in found.error


def test_disabling_a_plugin_that_there_is_not_names_the_nearest():
    found = discover(())
    (fault,) = unknown_disabled({"HALFBYTE_DISABLE_PLUGINS": "halfbite"}, found)
    assert "'halfbyte'" in fault
    assert unknown_disabled({"HALFBYTE_DISABLE_PLUGINS": " halfbyte ,"}, found) == []


def test_strict_makes_a_failure_an_error():
    gone = EntryPoint(name="gone", value="no_such_module_of_ours", group="halfbyte")
    with pytest.raises(PluginError, match="'gone'"):
        discover([gone], strict=True)
    assert discover([gone], strict=True, disabled=["gone"])
