"""load_model: a checkpoint folder becomes a transformers model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from halfbyte.checkpoints.plan import Plan, plan
from halfbyte.checkpoints.reader import Checkpoint
from halfbyte.checkpoints.sources import LayerPlan
from halfbyte.decisions import machine_here
from halfbyte.errors import CheckpointError
from halfbyte.groups import ModelResolution, resolve_model
from halfbyte.models.names import Names, Source
from halfbyte.models.replace import check_replaceable
from halfbyte.models.skeleton import build_skeleton, require_transformers
from halfbyte.models.tensors import check_complete, keep_some_in_float32, load_parameter, move_buffers
from halfbyte.modules import FP4Experts, FP4Linear
from halfbyte.policies import Policy, Weights
from halfbyte.problems import ExpertsProblem
from halfbyte.weights import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Called with (steps done, steps in all) while a model is loading.
Progress: TypeAlias = Callable[[int, int], None]


def load_model(
    path: str | PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    policy: Policy | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a checkpoint folder as a transformers causal language model whose quantized layers run FP4 kernels.

    The model is in eval mode and takes no gradients. Its quantized layers are FP4Linear and FP4Experts. Weights are
    read layer by layer, straight to the device, in `dtype` where they are not quantized.

    Args:
        path: the folder with config.json and safetensors files.
        device: "cpu", "cuda", "cuda:1", "xpu", ...; by default the first accelerator that torch can drive.
        dtype: float32, bfloat16 or float16, of activations and unquantized weights; by default the checkpoint's.
        policy: demands on the choice of kernels.
        weights: "packed", "dequantized" or "auto", above what `policy` says of it.
        progress: called with (steps done, steps in all).

    Raises:
        MissingExtraError: transformers or accelerate is not installed.
        CheckpointError: the folder cannot be read, or transformers' model and the checkpoint do not fit together.
        NoKernelError: nothing can run some layer. OutOfMemoryError: the weights do not fit. Both before any is loaded.
        UsageError: a device, dtype or kernel that does not exist.
    """
    require_transformers()
    the_plan = plan(Path(path), dtype if dtype is None or isinstance(dtype, str) else dtype_name(dtype))
    resolution = _resolve(the_plan, device, policy, weights)
    resolution.check()
    where = torch.device(resolution.machine.device if device is None else device)
    model = _skeleton(the_plan)
    names = Names(model, the_plan.path)
    modules = _modules(model, names, the_plan)
    _fill(model, resolution, modules, names.sources(the_plan.unquantized, modules.values()), where, progress)
    _tie(model, modules.values())
    move_buffers(model, where)
    check_complete(model, the_plan.path)
    return model


def load_tokenizer(path: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; CheckpointError if it has none that transformers can read."""
    require_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever the tokenizer's code raises
        raise CheckpointError(
            f"{path}: transformers cannot read its tokenizer: {type(error).__name__}: {error}"
        ) from error


def _resolve(
    the_plan: Plan, device: str | torch.device | None, policy: Policy | None, weights: Weights | None
) -> ModelResolution:
    if weights is not None:
        policy = replace(policy or Policy(), weights=weights)
    return resolve_model(the_plan, machine_here(None if device is None else str(device)), policy)


def _skeleton(the_plan: Plan) -> PreTrainedModel:
    dtype: torch.dtype = getattr(torch, the_plan.dtype)
    model = build_skeleton(the_plan.path, dtype)
    keep_some_in_float32(model, dtype)
    return model


def _modules(model: PreTrainedModel, names: Names, the_plan: Plan) -> dict[str, str]:
    """The module of each quantized layer, by the layer's name; checked to compute what replaces it."""
    modules = {layer.name: names.module_of(layer.name, layer.problem) for layer in the_plan.layers}
    for layer in the_plan.layers:
        check_replaceable(f"{the_plan.path}: {layer.name}", model.get_submodule(modules[layer.name]), layer.problem)
    return modules


def _fill(
    model: PreTrainedModel,
    resolution: ModelResolution,
    modules: dict[str, str],
    sources: dict[str, Source],
    device: torch.device,
    progress: Progress | None,
) -> None:
    layers = resolution.plan.layers
    steps = len(layers) + len(sources)
    with Checkpoint(resolution.plan) as checkpoint:
        for step, layer in enumerate(layers):
            _report(progress, step, steps)
            model.set_submodule(modules[layer.name], _fp4_module(checkpoint, layer, resolution, device))
        for step, (target, source) in enumerate(sources.items(), start=len(layers)):
            _report(progress, step, steps)
            load_parameter(model, checkpoint, target, source, device)
    _report(progress, steps, steps)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _fp4_module(
    checkpoint: Checkpoint, layer: LayerPlan, resolution: ModelResolution, device: torch.device
) -> nn.Module:
    problem, chosen = layer.problem, resolution.resolution_of(layer.name)
    dtype: torch.dtype = getattr(torch, problem.dtype)
    if not isinstance(problem, ExpertsProblem):
        return FP4Linear(checkpoint.linear(layer), dtype=dtype, device=device, resolution=chosen)
    weights = checkpoint.experts(layer)
    if problem.shared_global_scale is None:  # the plan could not know; the block scales tell
        exact = weights.problem(dtype, top_k=problem.top_k, activation=problem.activation)
        chosen = resolution.decide_again(exact) if exact.shared_global_scale is False else chosen
    return FP4Experts(
        weights,
        top_k=problem.top_k,
        activation=problem.activation,
        dtype=dtype,
        device=device,
        resolution=chosen,
    )


def _tie(model: PreTrainedModel, replaced: Iterable[str]) -> None:
    """Share tied parameters. A replaced layer has weights of its own, whatever the configuration says."""
    for module in replaced:
        if model.all_tied_weights_keys.pop(f"{module}.weight", None) is not None:
            model.config.tie_word_embeddings = False
    missing = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
