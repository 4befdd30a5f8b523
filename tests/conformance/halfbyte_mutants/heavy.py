"""A plugin that imports torch when it only has to say what it offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from halfbyte.hookspecs import hookimpl
from halfbyte.specs import Fidelity, KernelSpec

if TYPE_CHECKING:
    from collections.abc import Sequence


@hookimpl
def halfbyte_api_version() -> int:
    return 1


@hookimpl
def halfbyte_kernels() -> Sequence[KernelSpec]:
    return [
        KernelSpec(
            id="mutant.heavy-plugin",
            op="linear",
            target="halfbyte_mutants.linear:NoFault",
            devices=("cuda" if torch.cuda.is_available() else "any",),
            schemes={"nvfp4-w4a16": Fidelity.EMULATED},
            dtypes=("float32",),
            global_scales="per-row",
            priority=0,
            auto=False,
        )
    ]
