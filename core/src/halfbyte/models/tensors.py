"""The tensors of a model that are not quantized: out of the checkpoint, into the skeleton."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.models.names import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_parameter(
    model: PreTrainedModel, checkpoint: Checkpoint, target: str, source: Source, device: torch.device
) -> None:
    """Read the tensors of one source, convert them as transformers would, and set what they make on `device`.

    Floating-point tensors take the dtype of the skeleton's parameter. CheckpointError naming the tensors for a shape
    that is not the parameter's.
    """
    if source.converter is None:
        made: dict[str, Any] = {target: checkpoint.tensor(source.tensors[0][0].name)}
    else:
        for info, pattern in source.tensors:
            source.converter.add_tensor(target, info.name, pattern, checkpoint.tensor(info.name))
        try:
            made = source.converter.convert(target, model=model, config=model.config)
        except (RuntimeError, ValueError) as error:
            raise _error(source, f"cannot become {target}: {error}") from error
    for name, tensor in made.items():
        _set(model, name, tensor[0] if isinstance(tensor, list) else tensor, device, source)


def keep_some_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the skeleton's parameters that must not lose precision the dtype float32, as transformers does."""
    names = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    if not names:
        return
    pattern = re.compile("|".join(name.replace("*", ".*") for name in sorted(names)))
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.float()


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what no checkpoint holds, such as rotary frequencies, beside the parameters."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device != device:
                module._buffers[name] = buffer.to(device)


def check_complete(model: nn.Module, path: Path) -> None:
    """CheckpointError naming what was never loaded."""
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise CheckpointError(f"{path}: nothing was loaded for {', '.join(left)}")


def _set(model: nn.Module, name: str, tensor: Tensor, device: torch.device, source: Source) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    old: Tensor = getattr(module, leaf)
    if old.shape != tensor.shape:
        raise _error(source, f"has shape {list(tensor.shape)}; {name} needs {list(old.shape)}")
    new = tensor.to(device=device, dtype=old.dtype if tensor.is_floating_point() else None)
    setattr(module, leaf, new if leaf in module._buffers else nn.Parameter(new, requires_grad=False))


def _error(source: Source, what: str) -> CheckpointError:
    """An error about the tensors of a source, which names the first of them and its file."""
    count = len(source.tensors)
    return source.tensors[0][0].error(what if count == 1 else f"made of {count} tensors, {what}")
