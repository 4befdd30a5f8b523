"""The model without its numbers: modules as transformers builds them, parameters on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INSTALL = "pip install 'halfbyte[transformers]'"


def require_transformers() -> None:
    """MissingExtraError with the install line unless transformers and accelerate can be imported."""
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"loading a model needs transformers and accelerate ({error}); {_INSTALL}") from error


def build_skeleton(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the causal language model that config.json describes, in eval mode, without memory for its parameters.

    Parameters are on the meta device in `dtype`. Buffers are real: rotary frequencies are in no checkpoint, they are
    computed when a module is made. CheckpointError for a model that transformers does not know and for values that it
    refuses.
    """
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # halfbyte loads the quantized layers; transformers sees an ordinary model
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"it has no causal language model of type {config.model_type!r}")
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a value that a model cannot have raises whatever that model's code raises
        raise CheckpointError(
            f"{path / 'config.json'}: transformers cannot build this model: {type(error).__name__}: {error}"
        ) from error
    _read_generation_config(model, path)
    return model.eval()


def _read_generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
