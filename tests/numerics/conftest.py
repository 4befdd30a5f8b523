"""compressed-tensors as the oracle: its own classes and functions, called as its own layers call them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import dequantize, forward_quantize
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
from torch import Tensor

from halfbyte.formats import Format

REPOSITORY = Path(__file__).parents[2]
CHECKPOINTS = (
    REPOSITORY / "examples/tiny-python-lm",
    *(
        REPOSITORY / "tests/checkpoints" / name
        for name in ("tiny-python-llama-mxfp4a16", "tiny-python-qwen3moe-mxfp4", "tiny-python-qwen3moe-nvfp4a16")
    ),
)


def _args(fmt: Format) -> QuantizationArgs:
    """The arguments that compressed-tensors' presets have for dynamic activations in this format."""
    nvfp4 = fmt.has_global_scale
    return QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group" if nvfp4 else "group",
        group_size=fmt.group_size,
        dynamic="local" if nvfp4 else True,
        scale_dtype=torch.float8_e4m3fn if nvfp4 else torch.uint8,
    )


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def oracle_args() -> Callable[[Format], QuantizationArgs]:
    """(format) -> compressed-tensors' arguments for it."""
    return _args


@pytest.fixture
def oracle_dequantize() -> Callable[..., Tensor]:
    """(packed [N, K/2], scale codes uint8 [N, G], format, divisor float32 [1]) -> float32 [N, K]."""

    def run(packed: Tensor, codes: Tensor, fmt: Format, divisor: Tensor | None) -> Tensor:
        own = torch.float8_e4m3fn if fmt.scale == "e4m3" else torch.float8_e8m0fnu
        values = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=torch.float32)
        result: Tensor = dequantize(
            values, codes.view(own).float(), args=_args(fmt), dtype=torch.float32, global_scale=divisor
        )
        return result

    return run


@pytest.fixture
def oracle_fake_quantize() -> Callable[..., Tensor]:
    """(x, format, divisor float32 [1]) -> x's shape and dtype, as forward_quantize does it to a layer's input."""

    def run(x: Tensor, fmt: Format, divisor: Tensor | None = None) -> Tensor:
        layer = SimpleNamespace(quantization_status=QuantizationStatus.FROZEN, input_global_scale=divisor)
        result: Tensor = forward_quantize(layer, x.clone(), "input", _args(fmt))
        return result

    return run


@pytest.fixture
def oracle_quantize() -> Callable[..., tuple[Tensor, Tensor]]:
    """(weight float32 [N, K], format, divisor float32 [1]) -> packed and scales as its compressors store them."""

    def run(weight: Tensor, fmt: Format, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        args = _args(fmt)
        scales, _ = compute_dynamic_scales_and_zp(weight, args, None, global_scale=divisor)
        packed = quantize_and_pack_fp4(weight, scales, global_scale=divisor, group_size=fmt.group_size)
        compressor = NVFP4PackedCompressor if fmt.has_global_scale else MXFP4PackedCompressor
        return packed, compressor._compress_scale(scales, args)

    return run


@pytest.fixture
def same_bits() -> Callable[[Tensor, Tensor], None]:
    """Fail unless two tensors have one dtype, one shape and the same bits; all NaNs count as the same."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        integer = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[actual.element_size()]
        same = (actual.view(integer) == expected.view(integer)) | (actual.isnan() & expected.isnan())
        differing = (~same).nonzero()
        assert not len(differing), f"{len(differing)} differ, first at {differing[0].tolist()}"

    return check


@pytest.fixture(params=CHECKPOINTS, ids=lambda path: path.name)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """A small real checkpoint of compressed-tensors, in NVFP4 or MXFP4."""
    path: Path = request.param
    return path
