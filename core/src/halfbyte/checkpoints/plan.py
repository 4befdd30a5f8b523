"""Plan a checkpoint: its quantized layers as problems, from configuration, headers and scalars. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from halfbyte.checkpoints import compressed_tensors, gpt_oss, modelopt
from halfbyte.checkpoints.configs import Config
from halfbyte.checkpoints.headers import TensorInfo, read_headers
from halfbyte.checkpoints.layers import build_layers, natural
from halfbyte.checkpoints.sources import Found, LayerPlan
from halfbyte.errors import CheckpointError, UsageError, nearest
from halfbyte.problems import DTYPES

#: quant_method in config.json to the dialect that reads it.
DIALECTS: Final[Mapping[str, Callable[[Config, Mapping[str, TensorInfo]], Found]]] = {
    "compressed-tensors": compressed_tensors.find,
    "modelopt": modelopt.find,
    "mxfp4": gpt_oss.find,
}
#: What is stored for a quantized key-value cache; the cache stays unquantized here.
_CACHE_SCALES: Final = re.compile(r".*\.([kqv]|prob_output)_(scale|zero_point)|.*\.[kv]_proj\.output_scale")
#: What only quantized layers have. One that no layer uses would be silently lost.
_QUANTIZED: Final = re.compile(
    r"(weight|input|output)_(packed|shape|scale|scale_2|scale_inv|global_scale|zero_point|g_idx)"
    r"|pre_quant_scale|qweight|qzeros|scales"
)
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_QUANTIZED_DTYPES: Final = ("U8", "F8_", "F6_", "F4")
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Everything that is known of a checkpoint without reading its weights."""

    path: Path
    #: config.json as it is.
    config: Mapping[str, Any]
    #: "compressed-tensors", "modelopt" or "mxfp4" (gpt-oss).
    quant_method: str
    #: What the activations are computed in, such as "bfloat16".
    dtype: str
    #: In the order of the model.
    layers: tuple[LayerPlan, ...]
    #: The tensors of everything that is not quantized.
    unquantized: tuple[TensorInfo, ...]
    #: Tensors that nothing needs: scales of a quantized cache, input scales of weight-only layers.
    ignored: tuple[TensorInfo, ...]
    #: What a user may want to know: whole sentences.
    notes: tuple[str, ...]

    @property
    def unquantized_bytes(self) -> int:
        """Bytes of the unquantized tensors once they are loaded: floating-point ones take the compute dtype."""
        return sum(
            prod(info.shape) * DTYPES[self.dtype] if info.dtype in _FLOATS else info.nbytes for info in self.unquantized
        )


def plan(path: Path | str, dtype: str | None = None) -> Plan:
    """Plan the checkpoint in a folder, with activations in `dtype` (as config.json says, if None).

    Raises:
        CheckpointError: the folder is no FP4 checkpoint that can be run; names the file, and the tensor if it is one.
        UsageError: `dtype` is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}")
    folder = _folder(path)
    written = Config.read(folder / "config.json")
    config = written.with_text_config()
    quant_method, quantization = _quantization(folder, config)
    tensors, notes = read_headers(folder)
    found = DIALECTS[quant_method](quantization, tensors)
    if not found.matrices:
        described = dict(quantization.values)
        raise quantization.error(f"{folder} has no FP4 layers, though its quantization is described as {described}")
    cache = {name for name in tensors if name not in found.used and _CACHE_SCALES.fullmatch(name)}
    ignored = found.ignored | cache
    unquantized = [info for name, info in tensors.items() if name not in found.used and name not in ignored]
    _check_left_over(unquantized)
    compute = dtype or _dtype(config)
    return Plan(
        path=folder,
        config=written.values,
        quant_method=quant_method,
        dtype=compute,
        layers=build_layers(found.matrices, config, compute),
        unquantized=_sorted(unquantized),
        ignored=_sorted(tensors[name] for name in ignored),
        notes=(*notes, *found.notes),
    )


def _folder(path: Path | str) -> Path:
    folder = Path(path)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and the .safetensors files")
    if not folder.is_dir():
        hint = ""
        if _HUB_ID.fullmatch(str(path)):
            local = str(path).rpartition("/")[2]
            hint = f" If it is the name of a model on Hugging Face: hf download {path} --local-dir {local}"
        raise CheckpointError(f"{folder} does not exist. Only local folders are read.{hint}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no checkpoint folder")
    return folder


def _quantization(folder: Path, config: Config) -> tuple[str, Config]:
    """(dialect, its configuration), from config.json or from ModelOpt's own file."""
    described = config.mapping("quantization_config", "compression_config")
    own = folder / "hf_quant_config.json"
    if described is None and own.is_file():
        return "modelopt", _unwrapped(Config.read(own))
    if described is None:
        raise config.error(
            "has no quantization_config, and there is no hf_quant_config.json: this is no FP4 checkpoint"
        )
    method = described.text("quant_method")
    # ModelOpt's method also comes as modelopt_fp4 and modelopt_mixed, and with all details in its own file.
    name = "modelopt" if (method or "").startswith("modelopt") else method
    if name is None or name not in DIALECTS:
        raise config.error(
            f"quant_method is {method!r}; supported are {', '.join(DIALECTS)}. Found {dict(described.values)}"
        )
    if name != "modelopt":
        return name, described
    inner = _unwrapped(described)
    if inner.value("quant_algo") is None and own.is_file():
        inner = _unwrapped(Config.read(own))
    return name, inner


def _unwrapped(config: Config) -> Config:
    """ModelOpt's description may be wrapped once more, beside its producer."""
    return config.mapping("quantization") or config


def _check_left_over(unquantized: Iterable[TensorInfo]) -> None:
    for info in unquantized:
        if info.dtype.startswith(_QUANTIZED_DTYPES) or _QUANTIZED.fullmatch(info.name.rpartition(".")[2]):
            raise info.error(f"is {info.dtype} {list(info.shape)} of a quantized layer, but no FP4 layer uses it")


def _dtype(config: Config) -> str:
    name = (config.text("dtype", "torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in DTYPES:
        raise config.error(f"dtype is {name!r}; supported are {', '.join(DTYPES)}")
    return name


def _sorted(infos: Iterable[TensorInfo]) -> tuple[TensorInfo, ...]:
    return tuple(sorted(infos, key=lambda info: natural(info.name)))
