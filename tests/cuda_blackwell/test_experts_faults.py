"""Faults planted in the preparation of experts: each is outside what the conformance kit allows, in every kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")

from cuda_blackwell.experts_emulator.faults import FAULTS
from cuda_blackwell.experts_emulator.patches import emulated
from halfbyte.conformance import data, oracle
from halfbyte.conformance.tolerances import errors, tolerance
from halfbyte.kernels import ExpertsKernel, Packed, load_kernel
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_blackwell.experts_specs import EXPERTS

SPECS = {spec.id.removeprefix("flashinfer."): spec for spec in EXPERTS}
#: Kernel to a card and a scheme that it computes natively.
NATIVE = {
    "cutlass": (100, "nvfp4-w4a4"),
    "cute-dsl": (100, "nvfp4-w4a4"),
    "cute-dsl-a16": (100, "nvfp4-w4a16"),
    "trtllm": (100, "nvfp4-w4a4"),
    "b12x": (120, "nvfp4-w4a4"),
    "b12x-a16": (120, "nvfp4-w4a16"),
    "cutile": (90, "nvfp4-w4a16"),
}
QUANTIZING = ("cutlass", "cute-dsl", "trtllm", "b12x")
WEIGHT_ONLY = ("cute-dsl-a16", "b12x-a16", "cutile")


def is_right(kernel: str, fault: str, scheme_name: str = "") -> bool:
    """Whether the kernel is within the kit's tolerance, with this fault in what prepares its weights."""
    capability, native = NATIVE[kernel]
    name = scheme_name or native
    scheme, spec = SCHEMES[name], SPECS[kernel]
    weights = data.experts_weights(
        scheme, 4, 256, 256, dtype=torch.bfloat16, shared=True, input_scales=spec.input_scales
    )
    problem = weights.problem(torch.bfloat16, top_k=2, activation="silu")
    experts = load_kernel(spec)
    assert isinstance(experts, ExpertsKernel)
    x, routing = data.activations(33, 256, torch.bfloat16), data.routing(33, 4, 2)
    with emulated(capability), FAULTS[fault]():
        y = experts.apply(x, Packed(problem, experts.prepare(weights, problem)), *routing)
    rounding = oracle.rounding_of(spec, name)
    expected = oracle.experts(x, weights, *routing, activation="silu", rounding=rounding)
    return errors(y, expected).within(tolerance("experts", "nvfp4", "bfloat16", quantizes=rounding is not None))


@pytest.mark.parametrize("kernel", NATIVE)
def test_without_a_fault_it_is_right(kernel: str):
    assert is_right(kernel, "none")


@pytest.mark.parametrize(
    ("fault", "kernels"),
    [
        ("swapped-nibbles", tuple(NATIVE)),
        ("swapped-nibbles-down", tuple(NATIVE)),
        ("swapped-gate-up", tuple(NATIVE)),
        ("linear-scales", (*QUANTIZING, "cute-dsl-a16", "b12x-a16")),  # cutile's are linear before Blackwell
        ("unshuffled-rows", ("trtllm",)),
        ("uninterleaved-rows", ("cute-dsl", "cute-dsl-a16", "trtllm")),
        ("inverted-global-scale", WEIGHT_ONLY),
        ("inverted-factors", QUANTIZING),
        ("largest-input-scale", ("cutlass", "b12x")),  # the others are not given different ones
        ("other-input-scale", QUANTIZING),
    ],
)
def test_a_fault_is_found(fault: str, kernels: tuple[str, ...]):
    assert not [kernel for kernel in kernels if is_right(kernel, fault)]


def test_the_input_scale_that_b12x_takes_for_uncalibrated_activations_is_the_declared_one():
    assert is_right("b12x", "none", "nvfp4-w4a16")
    assert not is_right("b12x", "other-input-scale", "nvfp4-w4a16")


def test_every_fault_is_tried_on_a_kernel_that_has_the_step():
    used = {fault for mark in test_a_fault_is_found.pytestmark for fault, _ in mark.args[1]}
    assert used == set(FAULTS) - {"none"}
