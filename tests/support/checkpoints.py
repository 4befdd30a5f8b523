"""Write checkpoint folders: any configuration, any tensors, one file or shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def write_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    shards: int = 1,
    hf_quant_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json, safetensors (with an index if there is more than one shard) and return the folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if hf_quant_config is not None:
        (path / "hf_quant_config.json").write_text(json.dumps(hf_quant_config, indent=2))
    # Clones: safetensors refuses tensors that share memory or are not contiguous.
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(whole, path / "model.safetensors", {"format": "pt"})
        return path
    weight_map: dict[str, str] = {}
    names, size = iter(whole), -(-len(whole) // shards)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: whole[name] for name in islice(names, size)}
        save_file(part, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and all tensors of a checkpoint folder, to be changed and written again."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return json.loads((path / "config.json").read_text()), tensors
