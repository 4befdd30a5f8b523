"""Names: which module and which parameter of a transformers model each name in a checkpoint means.

Transformers' own conversion mapping is asked, so that a model that it renames, fuses or splits while loading (Mixtral's
block_sparse_moe, experts stored one by one) needs no table here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from halfbyte.checkpoints.headers import TensorInfo
from halfbyte.errors import CheckpointError
from halfbyte.problems import ExpertsProblem, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A buffer of each layer in old checkpoints; models compute it.
_COMPUTED: Final = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class Source:
    """One parameter's way out of the checkpoint: the tensors that make it, and what transformers does with them."""

    #: (tensor, pattern of the converter that it matched or None), experts in order.
    tensors: list[tuple[TensorInfo, str | None]] = field(default_factory=list)
    #: Transformers' WeightConverter; None for a tensor that is only renamed.
    converter: Any = None


class Names:
    """The names of one model, asked before any of its modules is replaced."""

    def __init__(self, model: PreTrainedModel, path: Path) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._model = model
        self._path = path
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer of the model, by name; on the meta device."""
        return dict(self._model.state_dict())

    def module_of(self, layer: str, problem: Problem) -> str:
        """The module that a quantized layer of the checkpoint means; CheckpointError if the model has none."""
        # Experts stored one by one have no tensor of their own name; the fused module always has down_proj.
        leaf = "down_proj" if isinstance(problem, ExpertsProblem) else "weight"
        target, pattern = self._rename(f"{layer}.{leaf}")
        if pattern is not None:
            raise CheckpointError(
                f"{self._path}: {layer}: transformers rearranges this layer while loading ({pattern}), "
                "which quantized weights cannot follow"
            )
        if target not in self.expected:
            raise CheckpointError(
                f"{self._path}: {layer}: {type(self._model).__name__} of transformers has no {target} to replace"
            )
        return target.removesuffix(f".{leaf}")

    def sources(self, tensors: Iterable[TensorInfo], replaced: Iterable[str]) -> dict[str, Source]:
        """Where every parameter outside the replaced modules comes from; `tensors` in the order of the model.

        CheckpointError naming the tensors that the model needs and the checkpoint lacks, and those that it does not
        know. Tied parameters need one tensor for all of them.
        """
        prefixes = tuple(f"{module}." for module in replaced)
        wanted = {name for name in self.expected if not name.startswith(prefixes)}
        found: dict[str, Source] = {}
        unexpected = []
        for tensor in tensors:
            target, pattern = self._rename(tensor.name)
            if target in wanted:
                source = found.setdefault(target, Source(converter=self._converter_of(pattern)))
                source.tensors.append((tensor, pattern))
            elif not self._may_ignore(tensor.name, target):
                unexpected.append(tensor)
        missing = wanted - {name for target, source in found.items() for name in _targets(target, source)}
        self._check(sorted(missing - self._tied(missing)), unexpected)
        return found

    def _rename(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self.expected)
        if target not in self.expected and name in self.expected:
            return name, None
        return target, pattern

    def _converter_of(self, pattern: str | None) -> Any:
        found = next((entry for entry in self._converters if pattern in entry.source_patterns), None)
        return deepcopy(found)

    def _may_ignore(self, tensor: str, target: str) -> bool:
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()
        return bool(_COMPUTED.search(tensor)) or any(re.search(pattern, target) for pattern in patterns)

    def _tied(self, missing: set[str]) -> set[str]:
        """Those of the missing parameters that are tied to one that is there, in either direction."""
        pairs = self._model.all_tied_weights_keys.items()
        tied = {target for target, source in pairs if source not in missing}
        return tied | {source for target, source in pairs if target not in missing}

    def _check(self, missing: Sequence[str], unexpected: Sequence[TensorInfo]) -> None:
        patterns = self._model._keys_to_ignore_on_load_missing or ()
        missing = [name for name in missing if not any(re.search(pattern, name) for pattern in patterns)]
        model = type(self._model).__name__
        if missing:
            raise CheckpointError(f"{self._path} lacks tensors that {model} needs: {_listed(missing)}")
        if unexpected:
            more = _listed([tensor.name for tensor in unexpected])
            raise unexpected[0].error(f"{model} has no place for {more}")


def _targets(target: str, source: Source) -> list[str]:
    """Every parameter that a source makes: a converter may split one tensor into several."""
    if source.converter is None:
        return [target]
    first, *others = source.converter.target_patterns
    return [target, *(target.replace(first, other) for other in others)]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
