"""Transformers models whose quantized layers run halfbyte's kernels."""

from halfbyte.models.load import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
