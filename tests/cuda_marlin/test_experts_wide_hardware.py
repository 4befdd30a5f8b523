"""The grouped product for experts with many rows each, against float64: needs a Hopper card."""

import pytest
import torch

from halfbyte.conformance import data, oracle
from halfbyte.schemes import SCHEMES
from halfbyte.weights import ExpertsWeights
from halfbyte_cuda_marlin.cuda import experts_wide, routing
from halfbyte_cuda_marlin.cuda.experts_packing import pack_experts
from halfbyte_cuda_marlin.cuda.packing import pack_codes

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an SM90 card"
    ),
]


def expected_rows(
    weights: ExpertsWeights, activation: str | None, sorted_x: torch.Tensor, experts: list[int]
) -> torch.Tensor:
    """One projection, with its activation, of rows that go to these experts: float64."""
    if activation is None:
        projections = [weights.down]
    else:
        projections = [weights.up] if weights.gate is None else [weights.gate, weights.up]
    results = []
    for matrix in projections:
        values = oracle.dequantize(matrix).cuda()
        product = torch.stack([values[e] @ row for row, e in zip(sorted_x.double(), experts, strict=True)])
        if matrix.bias is not None:
            product += matrix.bias.double().cuda()[experts]
        results.append(product)
    if activation is None:
        return results[0]
    if activation == "relu2":
        return results[0].relu().square()
    gate, up = results
    if activation == "silu":
        return gate * gate.sigmoid() * up
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * (1.702 * gate).sigmoid()


CASES = [
    # scheme, dtype, activation, bias, block, hidden, intermediate, tokens
    ("nvfp4-w4a16", torch.bfloat16, "silu", False, 64, 256, 128, 150),
    ("nvfp4-w4a16", torch.bfloat16, "silu", False, 64, 128, 96, 4000),  # more than 16 blocks of an expert
    ("nvfp4-w4a16", torch.float16, "gelu_tanh", True, 64, 288, 160, 90),
    ("mxfp4-w4a16", torch.bfloat16, "swigluoai", True, 64, 1440, 96, 40),
    ("mxfp4-w4a16", torch.float16, "relu2", False, 64, 256, 352, 65),
    ("nvfp4-w4a16", torch.bfloat16, "relu2", True, 96, 160, 288, 200),
    ("mxfp4-w4a16", torch.bfloat16, "silu", False, 96, 512, 352, 333),
    ("nvfp4-w4a16", torch.float16, "silu", False, 192, 256, 480, 401),
    ("mxfp4-w4a16", torch.bfloat16, "gelu_tanh", True, 192, 736, 96, 600),
    ("nvfp4-w4a16", torch.bfloat16, "silu", True, 160, 1440, 96, 700),
    ("mxfp4-w4a16", torch.float16, "swigluoai", True, 160, 544, 224, 513),
]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("scheme", "dtype", "activation", "bias", "block", "hidden", "intermediate", "tokens"), CASES)
def test_every_row_meets_its_expert(
    scheme, dtype, activation, bias, block, hidden, intermediate, tokens, elsewhere: bool
):
    experts, top_k = 5, 2
    weights = data.experts_weights(
        SCHEMES[scheme], experts, hidden, intermediate, dtype=dtype, gated=activation != "relu2", bias=bias
    )
    packed = {name: tensor.cuda() for name, tensor in pack_experts(weights, dtype, pack_codes).items()}
    ids, _ = data.routing(tokens, experts + 1, top_k, seed=tokens)  # the last expert is none
    expert_map = torch.tensor([2, -1, 0, 4, -1, 3], dtype=torch.int32) if elsewhere else None
    local = ids if expert_map is None else expert_map[ids.long()]
    x = data.activations(tokens, hidden, dtype, seed=tokens).cuda()
    where = routing.route(ids.cuda(), None if expert_map is None else expert_map.cuda(), experts, block)
    for name, act in (("first", activation), ("down", None)):
        units = packed[name]
        width = intermediate if name == "first" else hidden
        plan = experts_wide.plan(ids.numel(), experts, block, *units.shape[1:], 132)
        number = ("silu", "gelu_tanh", "swigluoai", "relu2").index(activation) + 1 if act else 0
        mxfp4, bf16 = scheme.startswith("mxfp4"), dtype == torch.bfloat16
        kernel = experts_wide.load(plan, x.device, mxfp4=mxfp4, bf16=bf16, act=number)
        y = torch.full((ids.numel(), width), float("nan"), dtype=dtype, device="cuda")
        source = x if name == "first" else data.activations(ids.numel(), intermediate, dtype).cuda()
        arguments = (units, packed[f"{name}_rows"], packed.get(f"{name}_bias"), y, where)
        experts_wide.run(kernel, plan, source, *arguments, gather=name == "first")
        slots = [slot for slot in where.source.tolist() if slot >= 0]
        rows = source[torch.tensor(slots, device="cuda") // top_k] if name == "first" else source[: len(slots)]
        wanted = expected_rows(weights, act, rows, [int(local.flatten()[slot]) for slot in slots])
        error = (y[: len(slots)].double() - wanted).norm() / wanted.norm()
        assert error < (2.5e-3 if bf16 else 4e-4)
        assert y[len(slots) :].isnan().all()
        where.tickets.zero_()
        again = torch.full_like(y, float("nan"))
        experts_wide.run(kernel, plan, source, *arguments[:3], again, where, gather=name == "first")
        assert torch.equal(again[: len(slots)], y[: len(slots)])
