"""The five entry points of humming-kernels 0.1 that we call, and the import that gives them.

Read from its wheel, 0.1.19: `humming/config/config.py`, `transform.py`, `tune/__init__.py`, `kernel/humming.py`,
`ops/launcher.py`. Its layer classes are left alone: they choose a schema by the names of a checkpoint's fields.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from halfbyte.errors import PluginError

_NO_BACKGROUND: Final = "HUMMING_DISABLE_PARALLEL_BUILD"
#: What to do where it finds no compiler; an installed CUDA toolkit serves as well.
_HINT: Final = "its compiler needs NVRTC and the headers of torch's CUDA release: pip install 'humming-kernels[cu13]'"


@dataclass(frozen=True, slots=True)
class Library:
    """Everything of humming that this plugin calls."""

    LayerConfig: Callable[..., Any]
    transform: Callable[..., dict[str, Tensor]]
    fit_fp16_scales: Callable[..., tuple[Any, dict[str, Tensor]]]
    heuristics: Callable[..., dict[str, Any]]
    prepare_kernels: Callable[..., Tensor]
    launch: Callable[..., Tensor]


@functools.cache
def library() -> Library:
    """Import humming. PluginError if that fails."""
    with _alone(), told("be imported"):
        transform, launcher = import_module("humming.transform"), import_module("humming.ops")
        return Library(
            LayerConfig=import_module("humming.config").LayerConfig,
            transform=transform.transform_humming_tensors,
            fit_fp16_scales=transform.prepare_fp16_e8m0_scale,
            heuristics=import_module("humming.tune").get_heuristics_config,
            prepare_kernels=import_module("humming.kernel.humming").HummingKernel.prepare_kernels,
            launch=launcher.launch_kernel,
        )


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever humming raises (it asserts without a word) becomes a PluginError that says what it was to do.

    Lack of memory stays what it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        detail = f"{type(error).__name__}: {error}".rstrip(": ")
        hint = f" ({_HINT})" if isinstance(error, (RuntimeError, OSError)) else ""
        raise PluginError(f"marlin.humming: humming-kernels could not {what}: {detail}{hint}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Imported as it is, humming starts two Python processes that would compile what its wheel has compiled."""
    before = os.environ.get(_NO_BACKGROUND)
    os.environ[_NO_BACKGROUND] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_BACKGROUND]
        else:
            os.environ[_NO_BACKGROUND] = before
