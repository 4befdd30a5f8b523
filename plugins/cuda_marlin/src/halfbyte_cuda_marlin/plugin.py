"""What this distribution declares to halfbyte. Torch-free: a kernel's module is imported only when it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfbyte.plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from halfbyte.specs import KernelSpec


@hookimpl
def halfbyte_api_version() -> int:
    """Return the version of the plugin contract that this plugin was written for."""
    return 1


@hookimpl
def halfbyte_kernels() -> Sequence[KernelSpec]:
    """Return no kernel: this version declares none yet."""
    return ()
