"""A card that is not there, for FlashInfer's own Python code: tensors say that they are on it and stay on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from cuda_blackwell.flashinfer_emulator.patches import emulated

#: Of the cards that were sold first: tactics follow from them.
MULTIPROCESSORS = {89: 142, 90: 132, 100: 148, 103: 148, 120: 188, 121: 48}
#: Bytes of a multiprocessor.
SHARED_MEMORY = {89: 102400, 90: 233472, 100: 233472, 103: 233472, 120: 102400, 121: 102400}


class OnCard(TorchFunctionMode):
    """Tensors answer that they are on card 0, and are made on the CPU.

    Those of float64 are where they are: core's global scales, which stay on the host.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Turn what is asked of a device; leave the rest."""
        named = kwargs or {}
        if func is torch.device:
            return func(*args, **named)
        asked = getattr(func, "__self__", None)
        if asked is torch.Tensor.device and args[0].dtype != torch.float64:
            return torch.device("cuda", 0)
        if asked is torch.Tensor.is_cuda:
            return True
        return func(*map(_at_home, args), **{name: _at_home(value) for name, value in named.items()})


def _at_home(value: object) -> object:
    on_card = isinstance(value, torch.device | str) and str(value).startswith("cuda")
    return torch.device("cpu") if on_card else value


@contextlib.contextmanager
def absent_card(capability: int) -> Iterator[None]:
    """Such a card, with doubles of what FlashInfer compiles by nvcc for linear layers; kernels of Triton do nothing."""
    memory = SHARED_MEMORY[capability]
    properties = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[capability],
        major=capability // 10,
        minor=capability % 10,
        shared_memory_per_block_optin=memory - 1024,
    )
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: divmod(capability, 10),
        "current_device": lambda: 0,
        "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": lambda: False,
        "is_available": lambda: True,
        "device": lambda _: contextlib.nullcontext(),
    }
    with emulated(capability), contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch("triton.runtime.jit.JITFunction.run", return_value=None))
        stack.enter_context(mock.patch("cutlass.base_dsl.runtime.cuda.get_device_attribute", return_value=memory))
        yield
