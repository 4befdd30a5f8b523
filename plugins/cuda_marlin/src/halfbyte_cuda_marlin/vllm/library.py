"""vLLM's compiled libraries: found by its metadata and loaded into torch. Nothing of vllm is imported."""

from __future__ import annotations

import functools
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import PluginError


@functools.cache
def operator(name: str) -> Any:
    """The operator of this name, such as "_C::marlin_gemm", from the library that the namespace names.

    PluginError saying what was looked for where, and what to do, if vllm, the library or the operator is missing, or
    the library does not load.
    """
    namespace, _, short = name.partition("::")
    found = _in_torch(namespace, short)
    for file in () if found is not None else _libraries(namespace):
        _load(file)
        found = _in_torch(namespace, short)
        if found is not None:
            break
    if found is None:
        raise PluginError(
            f"vllm {_vllm().version} has no operator {name}; this version of halfbyte-cuda-marlin was made for "
            "vllm 0.26 to 0.33: install one of these, or a newer halfbyte-cuda-marlin"
        )
    return found


def _in_torch(namespace: str, short: str) -> Any:
    """The operator if some library registered it, whoever loaded that."""
    return getattr(getattr(getattr(torch.ops, namespace), short, None), "default", None)


def _libraries(namespace: str) -> list[Path]:
    vllm = _vllm()
    folder = Path(str(vllm.locate_file("vllm")))
    found = sorted(folder.glob(f"{namespace}[._]*so"))
    if not found:
        raise PluginError(
            f"vllm {vllm.version} has no compiled library {namespace}*.so in {folder}; it may be a build for another "
            "kind of device, or installed from source without being compiled. Install vllm's wheel for CUDA"
        )
    return found


def _load(file: Path) -> None:
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        vllm = _vllm()
        built = next((line for line in vllm.requires or () if line.startswith("torch==")), "an unknown torch")
        raise PluginError(
            f"{file.name} of vllm {vllm.version} does not load: {error}. It was built for {built}, and torch "
            f"{torch.__version__} is installed: install the two together (pip install vllm)"
        ) from error


def _vllm() -> Distribution:
    try:
        return distribution("vllm")
    except PackageNotFoundError:
        raise PluginError("vllm is not installed; pip install 'vllm>=0.26'") from None
