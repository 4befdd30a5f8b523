"""The decision for a whole checkpoint: groups, memory, and the form of the weights decided once for the model."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoints import plan
from halfbyte.errors import NoKernelError, OutOfMemoryError
from halfbyte.groups import decide_model
from halfbyte.machines import Machine
from halfbyte.policies import Policy
from halfbyte.problems import dequantized_bytes
from halfbyte.specs import Fidelity
from support.specs import kernel, plugged

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "tiny-python-lm"
KERNELS = plugged(
    kernel("packed", priority=10),
    kernel("dense", priority=20, keeps="dequantized", resident_bytes=dequantized_bytes),
)


def decided(memory: int | None, *policies: Policy, kernels: Any = KERNELS):
    return decide_model(plan(EXAMPLE), Machine(name="cpu", arch="cpu", memory=memory), kernels, policies)


def chosen(model: Any) -> set[str]:
    return {group.resolution.chosen().spec.id for group in model.groups}


def test_layers_with_one_problem_share_one_resolution_and_every_layer_is_in_one_group():
    model = decided(None)
    assert [len(group.layers) for group in model.groups] == [6, 12, 12, 12]
    assert all(model.resolution_of(name) is group.resolution for group in model.groups for name in group.layers)
    assert model.bytes == model.plan.unquantized_bytes + sum(group.bytes for group in model.groups)


def test_weights_are_dequantized_only_where_they_take_at_most_half_of_the_memory():
    dense = decided(None).bytes
    assert chosen(decided(2 * dense)) == {"dense"}
    assert chosen(decided(2 * dense - 2)) == {"packed"}
    assert chosen(decided(None)) == {"dense"}


def test_the_user_decides_the_form_of_the_weights_against_the_memory():
    dense = decided(None).bytes
    assert chosen(decided(int(1.2 * dense), Policy(weights="dequantized"))) == {"dense"}
    assert chosen(decided(None, Policy(weights="packed"))) == {"packed"}


def test_memory_is_named_where_it_decided_and_gives_way_to_a_kernel_that_is_named():
    dense = decided(None).bytes
    assert {group.resolution.decided_by for group in decided(dense + 2).groups} == {"memory"}
    assert chosen(decided(dense + 2, Policy(require="dense"))) == {"dense"}
    assert chosen(decided(dense + 2, Policy(prefer="dense", origin="environment"))) == {"dense"}
    assert chosen(decided(dense + 2, Policy(weights="auto"))) == {"packed"}


def test_unquantized_tensors_count_in_the_compute_dtype():
    as_stored, wider = plan(EXAMPLE).unquantized_bytes, plan(EXAMPLE, "float32").unquantized_bytes
    assert wider == 2 * as_stored


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded():
    with pytest.raises(OutOfMemoryError, match="tiny-python-lm"):
        decided(3_000_000).check()
    decided(None).check()


def test_layers_that_nothing_can_run_are_named():
    kernels = plugged(kernel("other", schemes={"mxfp4-w4a4": Fidelity.NATIVE}))
    with pytest.raises(NoKernelError, match=r"down_proj and 5 more layers.*\n.*\n.*scheme"):
        decided(None, kernels=kernels).check()
