"""The dialect of compressed-tensors (llm-compressor): NVFP4 and MXFP4 in `weight_packed`. Torch-free.

Source: compressed-tensors' QuantizationConfig, and its match_targets for which group a module belongs to. Its global
scales are divisors: value = e2m1 * scale / weight_global_scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from halfbyte.checkpoints.configs import Config
from halfbyte.checkpoints.headers import TensorInfo
from halfbyte.checkpoints.matrices import Spelling, find_matrices
from halfbyte.checkpoints.sources import Found
from halfbyte.formats import FORMATS, Format
from halfbyte.schemes import Scheme

SPELLING: Final = Spelling(
    packed="weight_packed",
    scales="weight_scale",
    global_scale="weight_global_scale",
    input_global_scale="input_global_scale",
    divisors=True,
)
_STRATEGIES: Final = {"nvfp4": "tensor_group", "mxfp4": "group"}
#: How activations are quantized as they come: with a calibrated global scale ("local"), or with nothing calibrated.
_DYNAMIC: Final = {"nvfp4": "local", "mxfp4": True}
_SUPPORTED: Final = (
    "supported are NVFP4 (4-bit float, symmetric, strategy tensor_group, group_size 16) and "
    "MXFP4 (4-bit float, symmetric, strategy group, group_size 32)"
)


def find(quantization: Config, tensors: Mapping[str, TensorInfo]) -> Found:
    """Every quantized matrix of a compressed-tensors checkpoint; CheckpointError for what cannot be run."""
    _check_whole(quantization)
    found = find_matrices(tensors, SPELLING, _Targets(quantization).scheme_of)
    return found.without_cache_quantization() if quantization.mapping("kv_cache_scheme") else found


class _Targets:
    """Which scheme a module has: an exact name wins over a regular expression, and that over a class name."""

    def __init__(self, quantization: Config) -> None:
        self._config = quantization
        self._ignored = _Patterns(quantization, quantization.texts("ignore"))
        self._schemes: dict[str, Scheme] = {}
        for name, group in quantization.mappings("config_groups").items():
            scheme, targets = _group(quantization, name, group)
            self._schemes |= dict.fromkeys(targets, scheme)
        self._targets = _Patterns(quantization, self._schemes)

    def scheme_of(self, module: str, packed: TensorInfo) -> Scheme:
        if self._ignored.find(module) is not None:
            raise packed.error(f"is packed, but the ignore list in {self._config.file.name} has {module!r}")
        # Classes of modules are not stored; what is packed was a Linear.
        target = self._targets.find(module) or "Linear"
        if target not in self._schemes:
            known = ", ".join(self._schemes) or "none"
            raise packed.error(f"is packed, but no config group targets {module!r} (targets: {known})")
        return self._schemes[target]


class _Patterns:
    """Names and regular expressions ("re:...", anchored at the start alone) as compressed-tensors matches them."""

    def __init__(self, config: Config, texts: Iterable[str]) -> None:
        self._exact = {text for text in texts if not text.startswith("re:")}
        self._regexes = []
        for text in sorted(set(texts) - self._exact):
            try:
                self._regexes.append((re.compile(text.removeprefix("re:")), text))
            except (re.error, OverflowError, RecursionError) as error:
                raise config.error(f"{text!r} is no regular expression: {error}") from error

    def find(self, module: str) -> str | None:
        """The first text that matches the module, exact names first."""
        if module in self._exact:
            return module
        return next((text for regex, text in self._regexes if regex.match(module)), None)


def _check_whole(quantization: Config) -> None:
    """Refuse what changes the meaning of every packed tensor."""
    status = quantization.text("quantization_status")
    if status not in (None, "compressed"):
        raise quantization.error(
            f"quantization_status is {status!r}; only 'compressed' checkpoints hold packed weights"
        )
    sparsity = quantization.mapping("sparsity_config")
    if sparsity is not None and (form := sparsity.text("format")) not in (None, "dense"):
        raise quantization.error(f"sparsity_config has format {form!r}; sparse checkpoints are not supported")
    transforms = quantization.mapping("transform_config")
    if transforms is not None and transforms.mappings("config_groups"):
        raise quantization.error("transform_config asks for transforms (such as Hadamard), which are not supported")


def _group(quantization: Config, name: str, group: Config) -> tuple[Scheme, tuple[str, ...]]:
    weights, activations, outputs = (
        group.mapping(key) for key in ("weights", "input_activations", "output_activations")
    )
    fmt = next((fmt for fmt in FORMATS.values() if weights is not None and _is(fmt, weights)), None)
    if fmt is None:
        raise quantization.error(f"config group {name!r} has {_describe('weights', weights)}; {_SUPPORTED}")
    own, whole = group.text("format"), quantization.text("format")
    stored = own or whole or "mixed-precision"
    if stored not in ("mixed-precision", f"{fmt}-pack-quantized"):
        raise quantization.error(f"config group {name!r} has {fmt} weights in format {stored!r}, not packed")
    if outputs is not None:
        found = _describe("output activations", outputs)
        raise quantization.error(f"config group {name!r} has {found}, which are not supported")
    if activations is None:
        return Scheme(fmt), group.texts("targets")
    if not _is(fmt, activations) or activations.value("dynamic") != _DYNAMIC[fmt.name]:
        raise quantization.error(
            f"config group {name!r} has {fmt} weights with {_describe('input activations', activations)}; supported "
            f"are none, and {fmt} activations (dynamic: {_DYNAMIC[fmt.name]})"
        )
    return Scheme(fmt, fmt), group.texts("targets")


def _is(fmt: Format, args: Config) -> bool:
    """Whether quantization arguments describe this format."""
    found = (args.integer("num_bits"), args.text("type"), args.text("strategy"), args.integer("group_size"))
    expected = (4, "float", _STRATEGIES[fmt.name], fmt.group_size)
    return found == expected and args.flag("symmetric", default=True)


def _describe(what: str, args: Config | None) -> str:
    if args is None:
        return f"no {what}"
    symmetric = "symmetric" if args.flag("symmetric", default=True) else "asymmetric"
    bits, kind, strategy, size = (args.value(key) for key in ("num_bits", "type", "strategy", "group_size"))
    dynamic = args.values.get("dynamic", False)
    return f"{bits}-bit {kind} {what} ({symmetric}, strategy {strategy}, group_size {size}, dynamic: {dynamic})"
