"""A module is replaced only if the replacement computes the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from halfbyte.errors import CheckpointError
from halfbyte.models.replace import check_replaceable
from halfbyte.problems import ExpertsProblem, LinearProblem, Problem
from halfbyte.schemes import MXFP4_W4A16

LINEAR = LinearProblem(scheme=MXFP4_W4A16, n=96, k=64)
SILU = ExpertsProblem(scheme=MXFP4_W4A16, experts=4, top_k=2, hidden=64, intermediate=32)
SWIGLUOAI = replace(SILU, activation="swigluoai", bias=True)
RELU2 = replace(SILU, activation="relu2")


def mixtral(act: str = "silu") -> Any:
    return MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=4, hidden_act=act))


def gpt_oss(**constants: float) -> Any:
    experts = GptOssExperts(GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=4))
    for name, value in constants.items():
        setattr(experts, name, value)
    return experts


def nemotron_h(act: str = "relu2") -> Any:
    config = NemotronHConfig(
        hidden_size=64, moe_intermediate_size=32, n_routed_experts=4, mlp_hidden_act=act, moe_latent_size=None
    )
    return NemotronHExperts(config)


class Plain(nn.Linear):
    """A name of its own for what nn.Linear computes."""


class Shifted(nn.Linear):
    """As transformers' routers and grouped projections do: an nn.Linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's word
        return super().forward(input) + 1


def normalizing() -> Any:
    experts: Any = mixtral()
    experts.has_post_expert_norm = True
    return experts


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (nn.Linear(64, 96, bias=False), LINEAR),
        (nn.Linear(64, 96), replace(LINEAR, bias=True)),
        (Plain(64, 96, bias=False), LINEAR),
        (mixtral(), SILU),
        (mixtral("gelu_pytorch_tanh"), replace(SILU, activation="gelu_tanh")),
        (gpt_oss(), SWIGLUOAI),
        (nemotron_h(), RELU2),
    ],
)
def test_a_module_that_computes_the_problem_is_accepted(module: nn.Module, problem: Problem) -> None:
    check_replaceable("layer", module.to("meta"), problem)


@pytest.mark.parametrize(
    ("module", "problem", "message"),
    [
        (nn.Embedding(96, 64), LINEAR, "Embedding of transformers: it is no torch.nn.Linear"),
        (Shifted(64, 96, bias=False), LINEAR, "Shifted of transformers: it is no torch.nn.Linear"),
        (nn.Linear(96, 64, bias=False), LINEAR, "it is 64x96 and the checkpoint has 96x64"),
        (nn.Linear(64, 96), LINEAR, "it has a bias and the checkpoint has none"),
        (nn.Linear(64, 96, bias=False), replace(LINEAR, bias=True), "the checkpoint has a bias for it"),
        (nn.ModuleList(), SILU, "no fused experts module"),
        (mixtral(), replace(SILU, experts=8), r"\(4, 64, 32\).*checkpoint has \(8, 64, 32\)"),
        (gpt_oss(), replace(SWIGLUOAI, hidden=32, intermediate=64), r"\(4, 64, 32\)"),
        (mixtral(), replace(SILU, bias=True), "it has no biases, unlike the checkpoint"),
        (gpt_oss(), replace(SWIGLUOAI, bias=False), "it has biases, unlike the checkpoint"),
        (mixtral("gelu"), replace(SILU, activation="gelu_tanh"), "its activation function is not gelu_tanh"),
        (gpt_oss(limit=6.0), SWIGLUOAI, "its activation function is not swigluoai"),
        (gpt_oss(alpha=1.7), SWIGLUOAI, "its activation function is not swigluoai"),
        (mixtral(), RELU2, "it has a gate, unlike relu2"),
        (nemotron_h(), SILU, "it has no gate, unlike silu"),
        (nemotron_h("silu"), RELU2, "its activation function is not relu2"),
        (normalizing(), SILU, "it normalizes the output of each expert"),
    ],
)
def test_a_module_that_computes_something_else_is_refused(module: nn.Module, problem: Problem, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"layer: cannot replace .*{message}"):
        check_replaceable("layer", module.to("meta"), problem)


def test_gate_and_up_are_told_apart() -> None:
    swapped: Any = mixtral()
    swapped._apply_gate = lambda fused: swapped.act_fn(fused.chunk(2, dim=-1)[1]) * fused.chunk(2, dim=-1)[0]
    with pytest.raises(CheckpointError, match="activation function"):
        check_replaceable("layer", swapped, SILU)
