"""The dialect of compressed-tensors (llm-compressor): NVFP4 and MXFP4 in `weight_packed`. Torch-free.

Source: compressed-tensors' QuantizationConfig, and its match_targets for which group a module belongs to. Its global
scales are divisors: value = e2m1 * scale / weight_global_scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from halfbyte.checkpoints.headers import TensorInfo
from halfbyte.checkpoints.matrices import Spelling, find_matrices
from halfbyte.checkpoints.sources import Config, Found
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
    if quantization.values.get("kv_cache_scheme"):
        note = "kv_cache_scheme is not applied: keys and values stay unquantized"
        return Found(found.matrices, found.used, found.ignored, (note,))
    return found


class _Targets:
    """Which scheme a module has: an exact name wins over a regular expression, and that over a class name."""

    def __init__(self, quantization: Config) -> None:
        self._config = quantization
        self._ignored = _Patterns(quantization, quantization.names("ignore"))
        self._schemes: dict[str, Scheme] = {}
        for name, group in quantization.objects("config_groups").items():
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
            except re.error as error:
                raise config.error(f"{text!r} is no regular expression: {error}") from error

    def find(self, module: str) -> str | None:
        """The first text that matches the module, exact names first."""
        if module in self._exact:
            return module
        return next((text for regex, text in self._regexes if regex.match(module)), None)


def _check_whole(quantization: Config) -> None:
    """Refuse what changes the meaning of every packed tensor."""
    values = quantization.values
    status = values.get("quantization_status", "compressed")
    if status != "compressed":
        raise quantization.error(
            f"quantization_status is {status!r}; only 'compressed' checkpoints hold packed weights"
        )
    if (sparsity := (values.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise quantization.error(f"sparsity_config has format {sparsity!r}; sparse checkpoints are not supported")
    if (values.get("transform_config") or {}).get("config_groups"):
        raise quantization.error("transform_config asks for transforms (such as Hadamard), which are not supported")


def _group(quantization: Config, name: str, group: Mapping[str, Any]) -> tuple[Scheme, tuple[str, ...]]:
    weights, activations = group.get("weights"), group.get("input_activations")
    fmt = next((fmt for fmt in FORMATS.values() if _is(fmt, weights)), None)
    if fmt is None:
        raise quantization.error(f"config group {name!r} has {_describe('weights', weights)}; {_SUPPORTED}")
    stored = group.get("format") or quantization.values.get("format") or "mixed-precision"
    if stored not in ("mixed-precision", f"{fmt}-pack-quantized"):
        raise quantization.error(f"config group {name!r} has {fmt} weights in format {stored!r}, not packed")
    if group.get("output_activations"):
        found = _describe("output activations", group["output_activations"])
        raise quantization.error(f"config group {name!r} has {found}, which are not supported")
    if activations is not None and not (_is(fmt, activations) and activations.get("dynamic") == _DYNAMIC[fmt.name]):
        raise quantization.error(
            f"config group {name!r} has {fmt} weights with {_describe('input activations', activations)}; supported "
            f"are none, and {fmt} activations (dynamic: {_DYNAMIC[fmt.name]})"
        )
    return Scheme(fmt, None if activations is None else fmt), Config(quantization.file, group).names("targets")


def _is(fmt: Format, args: Any) -> bool:
    """Whether quantization arguments describe this format."""
    found = isinstance(args, Mapping) and [args.get(key) for key in ("num_bits", "type", "strategy", "group_size")]
    return found == [4, "float", _STRATEGIES[fmt.name], fmt.group_size] and args.get("symmetric", True) is True


def _describe(what: str, args: Any) -> str:
    if not isinstance(args, Mapping):
        return f"no {what}"
    symmetric = "symmetric" if args.get("symmetric", True) else "asymmetric"
    return (
        f"{args.get('num_bits')}-bit {args.get('type')} {what} ({symmetric}, strategy {args.get('strategy')}, "
        f"group_size {args.get('group_size')}, dynamic: {args.get('dynamic', False)})"
    )
