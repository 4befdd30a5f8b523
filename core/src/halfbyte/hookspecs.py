"""What a plugin implements. A plugin is a module named by an entry point in the group `halfbyte`.

    [project.entry-points.halfbyte]
    my-card = "my_package.plugin"

The module must be cheap to import: no torch and no vendor library. Kernels are named by their target and imported only
when one of them is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from halfbyte.specs import KernelSpec

#: The entry-point group, and pluggy's project name.
GROUP = "halfbyte"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def halfbyte_api_version() -> int:  # type: ignore[empty-body]  # pluggy calls the implementations
    """Return the version of this contract (halfbyte.specs.API_VERSION) that the plugin was written for."""


@hookspec
def halfbyte_kernels() -> Sequence[KernelSpec]:  # type: ignore[empty-body]  # as above
    """Return the declarations of all kernels that the plugin offers, on whatever machine it is asked."""
