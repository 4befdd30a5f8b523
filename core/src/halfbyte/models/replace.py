"""Checks that a module of a transformers model computes what its replacement would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import CheckpointError
from halfbyte.problems import ExpertsProblem, LinearProblem, Problem


def check_replaceable(layer: str, module: nn.Module, problem: Problem) -> None:
    """CheckpointError naming the layer unless `problem` is what `module` computes: its class, sizes and activation."""
    difference = (
        _experts_difference(module, problem)
        if isinstance(problem, ExpertsProblem)
        else _linear_difference(module, problem)
    )
    if difference:
        raise CheckpointError(f"{layer}: cannot replace {type(module).__name__} of transformers: {difference}")


def _linear_difference(module: nn.Module, problem: LinearProblem) -> str:
    # Transformers has subclasses (of a router, or of grouped heads) that compute something else.
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return "it is no torch.nn.Linear"
    if (module.out_features, module.in_features) != (problem.n, problem.k):
        return f"it is {module.out_features}x{module.in_features} and the checkpoint has {problem.n}x{problem.k}"
    if (module.bias is not None) != problem.bias:
        return "it has a bias and the checkpoint has none" if not problem.bias else "the checkpoint has a bias for it"
    return ""


def _experts_difference(module: nn.Module, problem: ExpertsProblem) -> str:
    # Experts fused in one module are recognized by what transformers' decorator gives them all, not by a list.
    if not hasattr(module, "is_transposed") or not hasattr(module, "down_proj"):
        return "it is no fused experts module (use_experts_implementation)"
    down: Tensor = module.down_proj  # type: ignore[assignment]
    shape = (problem.experts, problem.hidden, problem.intermediate)
    found = (down.shape[0], down.shape[2], down.shape[1]) if module.is_transposed else tuple(down.shape)
    if found != shape:
        return f"its down_proj is {found} (experts, hidden, intermediate) and the checkpoint has {shape}"
    if module.has_bias != problem.bias:
        return f"it has {'' if module.has_bias else 'no '}biases, unlike the checkpoint"
    if getattr(module, "has_post_expert_norm", False):  # not in every version of transformers
        return "it normalizes the output of each expert"
    return _activation_difference(module, problem)


def _activation_difference(module: Any, problem: ExpertsProblem) -> str:
    """Compare activation functions by their values: models clamp, scale and shift in ways that no name tells."""
    from halfbyte.reference.activations import activate

    if module.has_gate != problem.gated:
        return f"it has {'a' if module.has_gate else 'no'} gate, unlike {problem.activation}"
    points = torch.linspace(-24, 24, 97)
    up, gate = (grid.flatten() for grid in torch.meshgrid(points, points, indexing="ij"))
    if not problem.gated:
        actual, expected = module.act_fn(up), activate(problem.activation, None, up)
    else:
        fused = torch.cat((gate, up)) if module.is_concatenated else torch.stack((gate, up), dim=-1).flatten()
        actual, expected = module._apply_gate(fused), activate(problem.activation, gate, up)
    if torch.allclose(actual, expected, rtol=1e-5, atol=1e-5):
        return ""
    return f"its activation function is not {problem.activation}"
