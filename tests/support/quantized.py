"""Quantize weights with compressed-tensors' own functions, and spell them as each dialect of checkpoint does."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from torch import Tensor

#: max|x| that activations are calibrated to, unless a test says otherwise.
INPUT_AMAX = 4.0


def scheme_of(preset: str) -> QuantizationScheme:
    """compressed-tensors' scheme of "NVFP4", "NVFP4A16", "MXFP4" or "MXFP4A16"."""
    return preset_name_to_scheme(preset, ["Linear"])


def compressor_of(preset: str) -> Any:
    return BaseCompressor.get_value_from_registry(f"{preset[:5].lower()}-pack-quantized")


def quantized_linear(
    name: str, weight: Tensor, preset: str = "NVFP4", *, amax: float | None = None, input_amax: float = INPUT_AMAX
) -> dict[str, Tensor]:
    """The tensors of one module as compressed-tensors stores them; `amax` is what the global scale covers."""
    scheme = scheme_of(preset)
    grouped = weight.float().reshape(weight.shape[0], -1, scheme.weights.group_size)
    tensors: dict[str, Tensor] = {"weight": weight}
    global_scale = None
    if preset.startswith("NVFP4"):
        peak = torch.tensor([weight.abs().max().item() if amax is None else amax], dtype=torch.float32)
        global_scale = tensors["weight_global_scale"] = generate_gparam(-peak, peak)
        if preset == "NVFP4":
            peak = torch.tensor([input_amax])
            tensors["input_global_scale"] = generate_gparam(-peak, peak)
    scales, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights, global_scale=global_scale)
    tensors["weight_scale"] = scales
    compressed = compressor_of(preset).compress(tensors, scheme)
    return {f"{name}.{key}": value.contiguous() for key, value in compressed.items()}


def as_modelopt(tensors: dict[str, Tensor], *, input_scale: float | None = None) -> dict[str, Tensor]:
    """The same NVFP4 module in ModelOpt's spelling: multipliers without a dimension in place of divisors."""
    renamed = {}
    for name, tensor in tensors.items():
        module, _, key = name.rpartition(".")
        if key == "weight_packed":
            renamed[f"{module}.weight"] = tensor
        elif key == "weight_global_scale":
            renamed[f"{module}.weight_scale_2"] = tensor.reciprocal().squeeze()
        elif key == "input_global_scale":
            renamed[f"{module}.input_scale"] = tensor.reciprocal().squeeze()
        else:
            renamed[name] = tensor
        if input_scale is not None:
            renamed[f"{module}.input_scale"] = torch.tensor(input_scale)
    return renamed


def oracle_dequantize(module: str, tensors: dict[str, Tensor], preset: str) -> Tensor:
    """compressed-tensors' float32 weight [N, K] of one module, from tensors in its own spelling."""
    packed = tensors[f"{module}.weight_packed"]
    values = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, torch.float32)
    scale = compressor_of(preset)._decompress_scale(tensors[f"{module}.weight_scale"], torch.float32)
    args = scheme_of(preset).weights
    global_scale = tensors.get(f"{module}.weight_global_scale")
    weight: Tensor = dequantize(values, scale, args=args, global_scale=global_scale, dtype=torch.float32)
    return weight


def quantization_config(preset: str, ignore: list[str] | None = None) -> dict[str, Any]:
    """config.json's quantization_config as compressed-tensors writes it, for every Linear but the ignored ones."""
    scheme = scheme_of(preset)
    form = f"{preset[:5].lower()}-pack-quantized"
    scheme.format = form
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=ignore or [], format=form, quantization_status="compressed"
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return written
