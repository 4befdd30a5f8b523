"""The dialect of NVIDIA ModelOpt: NVFP4 in uint8 `weight`. Torch-free.

Source: ModelOpt's unified Hugging Face export, described by hf_quant_config.json or by config.json's
quantization_config. Its global scales are multipliers: value = e2m1 * weight_scale * weight_scale_2.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final

from halfbyte.checkpoints.configs import Config
from halfbyte.checkpoints.headers import TensorInfo
from halfbyte.checkpoints.matrices import Spelling, find_matrices
from halfbyte.checkpoints.sources import Found
from halfbyte.schemes import NVFP4_W4A4, NVFP4_W4A16, Scheme

SPELLING: Final = Spelling(
    packed="weight",
    scales="weight_scale",
    global_scale="weight_scale_2",
    input_global_scale="input_scale",
    divisors=False,
)
_ALGORITHMS: Final = {"NVFP4": NVFP4_W4A4, "W4A16_NVFP4": NVFP4_W4A16}
_MIXED: Final = "MIXED_PRECISION"


def find(quantization: Config, tensors: Mapping[str, TensorInfo]) -> Found:
    """Every quantized matrix of a ModelOpt checkpoint; CheckpointError for what cannot be run."""
    found = find_matrices(tensors, SPELLING, _Layers(quantization).scheme_of)
    cache = quantization.text("kv_cache_quant_algo") or quantization.mapping("kv_cache_scheme")
    return found.without_cache_quantization() if cache else found


class _Layers:
    """Which scheme a module has: the same everywhere, or as a map of names says."""

    def __init__(self, quantization: Config) -> None:
        self._config = quantization
        self._excluded: tuple[str, ...] = quantization.texts("exclude_modules") + quantization.texts("ignore")
        self._exact: dict[str, Scheme] = {}
        self._everywhere: Scheme | None = None
        if quantization.text("quant_algo") == _MIXED:
            for name, layer in quantization.mappings("quantized_layers").items():
                self._exact[name] = _scheme(layer, f"layer {name!r}")
        else:
            self._everywhere = _scheme(quantization, "the checkpoint")

    def scheme_of(self, module: str, packed: TensorInfo) -> Scheme:
        file = self._config.file.name
        for pattern in self._excluded:
            if fnmatchcase(module, pattern):
                raise packed.error(f"is packed, but {file} excludes {pattern!r}")
        scheme = self._everywhere or self._exact.get(module) or self._of_parent(module)
        if scheme is None:
            raise packed.error(f"is packed, but quantized_layers in {file} does not name {module!r}")
        return scheme

    def _of_parent(self, module: str) -> Scheme | None:
        """The scheme of the nearest parent or of the longest wildcard: experts are often named as a whole."""
        fitting = [name for name in self._exact if module.startswith(f"{name}.") or fnmatchcase(module, name)]
        return self._exact[max(fitting, key=len)] if fitting else None


def _scheme(described: Config, what: str) -> Scheme:
    algorithm = described.text("quant_algo")
    scheme = _ALGORITHMS.get(algorithm or "")
    if scheme is None:
        supported = f"{', '.join(_ALGORITHMS)}, and {_MIXED} of these"
        raise described.error(f"{what} has quant_algo {algorithm!r}; supported are {supported}")
    groups = described.mappings("config_groups").values()
    activations = [group.mapping("input_activations") for group in groups]
    for numbers in (described, *(weights for group in groups if (weights := group.mapping("weights")) is not None)):
        if (size := numbers.integer("group_size")) not in (None, scheme.weights.group_size):
            raise described.error(f"{what} has group_size {size!r}; {scheme.weights} has {scheme.weights.group_size}")
    # ModelOpt's older exports write weight-only checkpoints as NVFP4 with no input activations in any group.
    if activations and all(found is None for found in activations):
        return scheme.weight_only
    return scheme
