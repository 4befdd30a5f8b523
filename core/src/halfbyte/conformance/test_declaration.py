"""What a kernel says of itself is true: where it runs, what it takes, what it refuses, what it costs."""
# ruff: noqa: D103 - the name of a check says what it checks

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from halfbyte.conformance.cases import EXPERTS, Case, experts_cases, linear_settings
from halfbyte.conformance.environment import Environment
from halfbyte.conformance.subject import ask
from halfbyte.eligibility import refusals_for
from halfbyte.kernels import ExpertsKernel, LinearKernel, load_kernel
from halfbyte.machines import ARCHES, Machine, describe, matches
from halfbyte.plugins import installed_plugins
from halfbyte.problems import ACTIVATIONS, DTYPES, INPUT_SCALES, ExpertsProblem, LinearProblem, Problem
from halfbyte.refusals import Code
from halfbyte.schemes import SCHEMES
from halfbyte.specs import Fidelity, KernelSpec


def test_it_runs_every_declared_scheme_and_dtype_on_this_machine(
    spec: KernelSpec, kernel_environment: Environment
) -> None:
    for case in _settings(spec):
        resolution = ask(spec, problem_of(case), kernel_environment)
        chosen = resolution.chosen()
        assert chosen.spec is spec
        assert chosen.fidelity is spec.schemes[case.scheme.name]


def test_its_class_is_a_kernel_of_its_op(spec: KernelSpec, kernel_environment: Environment) -> None:
    refusals = refusals_for(spec, problem_of(next(_settings(spec))), kernel_environment.machine)
    if any(refusal.code.phase == "machine" for refusal in refusals):
        pytest.skip("; ".join(map(str, refusals)))
    assert isinstance(load_kernel(spec), LinearKernel if spec.op == "linear" else ExpertsKernel)


def test_its_plugin_imports_neither_torch_nor_what_its_kernels_require(spec: KernelSpec) -> None:
    plugin = next(plugin for plugin in installed_plugins() if spec in plugin.kernels)
    required = {canonicalize_name(Requirement(text).name) for kernel in plugin.kernels for text in kernel.requires}
    heavy = {"torch"} | {
        module
        for module, distributions in packages_distributions().items()
        if required & {canonicalize_name(name) for name in distributions}
    }
    program = (
        "import sys, importlib\n"
        f"module = importlib.import_module({plugin.target.partition(':')[0]!r})\n"
        f"heavy = {sorted(heavy)!r}\n"
        "print(','.join(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - our own program
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"importing {plugin.target} imports {done.stdout.strip()}"


def test_it_refuses_every_scheme_and_dtype_that_it_does_not_declare(spec: KernelSpec) -> None:
    case, machine = next(_settings(spec)), _own_machine(spec)
    for scheme in SCHEMES.values():
        refused = Code.SCHEME in _codes(spec, replace(problem_of(case), scheme=scheme), machine)
        assert refused == (scheme.name not in spec.schemes), scheme
    for dtype in DTYPES:
        refused = Code.DTYPE in _codes(spec, replace(problem_of(case), dtype=dtype), machine)
        assert refused == (dtype not in spec.dtypes), dtype


def test_it_refuses_every_device_that_it_does_not_declare(spec: KernelSpec) -> None:
    problem = problem_of(next(_settings(spec)))
    for machine in map(describe, ARCHES):
        declared = any(matches(pattern, machine) for pattern in spec.devices)
        assert (Code.DEVICE in _codes(spec, problem, machine)) == (not declared), machine


def test_it_refuses_sizes_off_its_alignments_unless_core_may_pad(spec: KernelSpec) -> None:
    machine = _own_machine(spec)
    for case in _settings(spec):
        group = case.scheme.weights.group_size
        problem = problem_of(replace(case, n=case.n + (1 if spec.op == "linear" else group), k=case.k + group))
        codes = _codes(spec, problem, machine)
        for code, axis, multiple in (
            (Code.N_MULTIPLE, 0, spec.n_multiple),
            (Code.K_MULTIPLE, 1, spec.k_multiple),
        ):
            fits = spec.pads or all(sizes[axis] % multiple == 0 for sizes in problem.matrices)
            assert (code in codes) == (not fits), problem


def test_it_refuses_activations_and_biases_of_experts_that_it_does_not_declare(spec: KernelSpec) -> None:
    problem, machine = problem_of(next(_settings(spec))), _own_machine(spec)
    if not isinstance(problem, ExpertsProblem):
        pytest.skip("a linear kernel has neither")
    for activation in ACTIVATIONS:
        refused = Code.ACTIVATION in _codes(spec, replace(problem, activation=activation), machine)
        assert refused == (activation not in spec.activations), activation
    assert (Code.BIAS in _codes(spec, replace(problem, bias=True), machine)) == (not spec.fuses_bias)


def test_it_refuses_experts_with_scales_that_it_does_not_take(spec: KernelSpec) -> None:
    machine = _own_machine(spec)
    for case in _settings(spec):
        problem = problem_of(case)
        if not isinstance(problem, ExpertsProblem):
            pytest.skip("a linear kernel has no experts")
        codes = _codes(spec, replace(problem, shared_global_scale=False), machine)
        assert (Code.GLOBAL_SCALES in codes) == (spec.global_scales == "per-expert" and problem.gated), problem
        if not spec.quantizes(case.scheme.name):
            continue
        taken = INPUT_SCALES.index(spec.input_scales)
        for place, input_scales in enumerate(INPUT_SCALES):
            codes = _codes(spec, replace(problem, input_scales=input_scales), machine)
            assert (Code.INPUT_SCALES in codes) == (place < taken), input_scales


def test_its_check_answers_for_every_machine_and_twice_the_same(spec: KernelSpec) -> None:
    for machine in map(describe, ARCHES):
        for case in _settings(spec):
            problem = problem_of(case)
            assert Code.CHECK_FAILED not in _codes(spec, problem, machine), machine
            assert refusals_for(spec, problem, machine) == refusals_for(spec, problem, machine)


def test_it_declares_the_rounding_of_its_activation_quantizer(spec: KernelSpec) -> None:
    assert spec.activation_rounding is not None or not any(map(spec.quantizes, spec.schemes))


def test_it_calls_no_weight_only_scheme_less_than_it_is(spec: KernelSpec) -> None:
    for name, fidelity in spec.schemes.items():
        assert fidelity is not Fidelity.WEIGHT_ONLY or name.endswith("w4a4"), f"{name} asks for nothing else"
        assert fidelity is not Fidelity.QUANTIZES_ACTIVATIONS or name.endswith("w4a16"), f"{name} asks for that"


def problem_of(case: Case) -> Problem:
    """The problem of a case, without bias."""
    if case.spec.op == "linear":
        return LinearProblem(scheme=case.scheme, n=case.n, k=case.k, dtype=case.dtype)
    return ExpertsProblem(
        scheme=case.scheme,
        experts=EXPERTS,
        top_k=2,
        hidden=case.k,
        intermediate=case.n,
        dtype=case.dtype,
        activation=case.activation,
    )


def _settings(spec: KernelSpec) -> Iterator[Case]:
    return linear_settings(spec) if spec.op == "linear" else experts_cases(spec)


def _own_machine(spec: KernelSpec) -> Machine:
    """A described machine among those that the kernel declares."""
    return next(m for m in map(describe, ARCHES) if any(matches(pattern, m) for pattern in spec.devices))


def _codes(spec: KernelSpec, problem: Problem, machine: Machine) -> set[Code]:
    return {refusal.code for refusal in refusals_for(spec, problem, machine)}
