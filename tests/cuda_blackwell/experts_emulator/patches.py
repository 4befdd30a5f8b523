"""Put the doubles in the place of what FlashInfer would compile for experts on a card of some capability."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import flashinfer
import flashinfer.fused_moe
import torch
from flashinfer.fused_moe import core, prepare
from flashinfer.quantization import fp4_quantization

from cuda_blackwell.experts_emulator import signatures
from cuda_blackwell.experts_emulator.b12x import B12x
from cuda_blackwell.experts_emulator.cute_dsl import cute_dsl
from cuda_blackwell.experts_emulator.cutile import CuTileLayer
from cuda_blackwell.experts_emulator.cutlass import Cutlass
from cuda_blackwell.experts_emulator.trtllm import trtllm
from cuda_blackwell.flashinfer_emulator.compiled import Quantization, built
from cuda_blackwell.flashinfer_emulator.patches import card
from halfbyte_cuda_blackwell import experts_cutile

_SM12X = "flashinfer.fused_moe.cute_dsl.blackwell_sm12x"


@contextlib.contextmanager
def emulated(capability: int) -> Iterator[B12x]:
    """A card, and doubles of the experts kernels."""
    quantization = fp4_quantization.get_fp4_quantization_module.__wrapped__
    b12x = B12x()
    layer = type("MoELayer", (CuTileLayer,), {"capability": capability})
    dsl = signatures.checked(cute_dsl, "fused_moe/cute_dsl/fused_moe.py", "cute_dsl_fused_moe")
    replaced: list[tuple[Any, str, Any]] = [
        (core, "get_compute_capability", lambda _: divmod(capability, 10)),
        (core, "device_support_pdl", lambda _: False),
        (core, "get_cutlass_fused_moe_module", lambda _: Cutlass()),
        (
            core,
            "get_trtllm_moe_sm100_module",
            lambda: SimpleNamespace(trtllm_fp4_block_scale_moe=trtllm),
        ),
        (torch.cuda, "device", lambda _: contextlib.nullcontext()),
        (fp4_quantization, "gen_fp4_quantization_module", lambda *_: built(Quantization())),
        (fp4_quantization, "get_fp4_quantization_module", quantization),
        (flashinfer.fused_moe, "cute_dsl_fused_moe", dsl),
        (flashinfer.fused_moe, "MoELayer", layer),
        (prepare, "_prepare_cutile_fp4_scales", _cutile_scales(capability)),
    ]
    experts_cutile._layer.cache_clear()
    with card(capability), modules(_b12x_modules(b12x)), contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield b12x
    experts_cutile._layer.cache_clear()


@contextlib.contextmanager
def modules(doubles: dict[str, ModuleType]) -> Iterator[None]:
    """These modules in the place of others; what is imported meanwhile stays, since torch can be imported once."""
    before = {name: sys.modules.get(name) for name in doubles}
    sys.modules.update(doubles)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _cutile_scales(capability: int) -> Any:
    """The library asks torch which card it is: a CPU would be a Blackwell one."""
    real = prepare._swizzle_cutile_fp4_scales

    def scales(scale: torch.Tensor, *, scale_block_size: int, device: torch.device) -> torch.Tensor:
        if capability < 100:
            return scale.contiguous()
        result: torch.Tensor = real(scale, scale_block_size=scale_block_size)
        return result

    return scales


def _b12x_modules(b12x: B12x) -> dict[str, ModuleType]:
    """The package without its __init__, which imports CuTe DSL; its own preparation of weights; a dispatch of ours."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("flashinfer")
    package = ModuleType(_SM12X)
    package.__path__ = [str(Path(spec.origin).parent / "fused_moe/cute_dsl/blackwell_sm12x")]
    source = "fused_moe/cute_dsl/blackwell_sm12x/moe_dispatch.py"
    dispatch = ModuleType(f"{_SM12X}.moe_dispatch")
    dispatch.__dict__.update(
        launch_sm120_moe=signatures.checked(b12x.launch, source, "launch_sm120_moe"),
        _get_weight_views=signatures.checked(b12x.weight_views, source, "_get_weight_views"),
    )
    doubles = {_SM12X: package, dispatch.__name__: dispatch}
    with modules(doubles):
        weights = importlib.import_module(f"{_SM12X}.moe_w4a16_prepare")
        host = sys.modules[f"{_SM12X}.moe_w4a16_host"]
        activations = sys.modules[f"{_SM12X}.moe_w4a16_activations"]
    weights.__dict__["_make_workspace"] = lambda device, **_: torch.zeros(10, dtype=torch.int32, device=device)
    return doubles | {module.__name__: module for module in (weights, host, activations)}
