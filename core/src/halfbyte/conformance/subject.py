"""A case bound to its environment: makes modules that run the kernel, and holds their results against the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from halfbyte.conformance import data, oracle
from halfbyte.conformance.cases import EXPERTS, Case
from halfbyte.conformance.environment import Environment
from halfbyte.conformance.tolerances import errors, tolerance
from halfbyte.decisions import Resolution, resolve
from halfbyte.kernels import load_kernel
from halfbyte.matrix import Matrix
from halfbyte.modules import FP4Experts, FP4Linear
from halfbyte.policies import Policy
from halfbyte.probe import probe
from halfbyte.problems import InputScales, Problem
from halfbyte.refusals import Code
from halfbyte.specs import Fidelity, KernelSpec
from halfbyte.weights import ExpertsWeights, LinearWeights


def ask(spec: KernelSpec, problem: Problem, environment: Environment) -> Resolution:
    """The resolution that requires the kernel, whatever else is demanded in this environment."""
    demands = Policy(
        require=spec.id,
        fidelity=Fidelity.QUANTIZES_ACTIVATIONS,
        activations="allow-quantized",
        weights="auto",
    )
    return resolve(problem, environment.machine, demands)


@dataclass(frozen=True, slots=True)
class Subject:
    """One case of one kernel in one environment."""

    case: Case
    environment: Environment

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and results."""
        dtype: torch.dtype = getattr(torch, self.case.dtype)
        return dtype

    @property
    def top_k(self) -> int:
        """Experts of each token in the kit's ordinary problems."""
        return 2

    def linear_weights(
        self, kind: data.WeightKind = "random", *, bias: bool = False, part_rows: tuple[int, ...] = ()
    ) -> LinearWeights:
        """Weights of the case's sizes, on the CPU."""
        case = self.case
        return data.linear_weights(
            case.scheme, case.n, case.k, dtype=self.dtype, kind=kind, bias=bias, part_rows=part_rows
        )

    def experts_weights(
        self,
        kind: data.WeightKind = "random",
        *,
        bias: bool = False,
        shared: bool = False,
        input_scales: InputScales | None = None,
    ) -> ExpertsWeights:
        """Weights of the case's sizes, on the CPU; global and input scales differ as far as the kernel takes it."""
        case = self.case
        return data.experts_weights(
            case.scheme,
            EXPERTS,
            case.k,
            case.n,
            dtype=self.dtype,
            kind=kind,
            gated=case.activation != "relu2",
            bias=bias,
            shared=shared or case.spec.global_scales == "per-expert",
            input_scales=input_scales or case.spec.input_scales,
        )

    def activations(self, rows: int, kind: data.ActivationKind = "random") -> Tensor:
        """Inputs [rows, k] on the device."""
        return data.activations(rows, self.case.k, self.dtype, seed=rows, kind=kind).to(self.environment.device)

    def routing(
        self, tokens: int, top_k: int | None = None, *, experts: int = EXPERTS, kind: data.Routing = "random"
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights [tokens, top_k] on the device."""
        ids, weights = data.routing(tokens, experts, top_k or self.top_k, seed=tokens, kind=kind)
        return ids.to(self.environment.device), weights.to(self.environment.device)

    def linear(self, weights: LinearWeights) -> FP4Linear:
        """The module that runs the kernel; skips the check where the kernel says that it cannot."""
        resolution = self._resolution(weights.problem(self.dtype))
        return FP4Linear(weights, dtype=self.dtype, device=self.environment.device, resolution=resolution)

    def experts(self, weights: ExpertsWeights, top_k: int | None = None) -> FP4Experts:
        """The same for experts."""
        top_k, activation = top_k or self.top_k, self.case.activation
        resolution = self._resolution(weights.problem(self.dtype, top_k=top_k, activation=activation))
        return FP4Experts(
            weights,
            top_k=top_k,
            activation=activation,
            dtype=self.dtype,
            device=self.environment.device,
            resolution=resolution,
        )

    def prepare(self, weights: LinearWeights | ExpertsWeights) -> dict[str, Tensor]:
        """What the kernel itself makes of weights on the device that need no padding."""
        if isinstance(weights, LinearWeights):
            problem: Problem = weights.problem(self.dtype)
        else:
            problem = weights.problem(self.dtype, top_k=self.top_k, activation=self.case.activation)
        self._resolution(problem)
        return load_kernel(self.case.spec).prepare(weights, problem)  # type: ignore[arg-type]  # both of one op

    def check_linear(self, module: FP4Linear, x: Tensor, weights: LinearWeights) -> None:
        """Fail unless the module gives what the oracle expects for x [M, k]."""
        rounding = oracle.rounding_of(self.case.spec, self.case.scheme.name)
        on_device = LinearWeights(scheme=weights.scheme, matrix=weights.matrix.to(x.device))
        self._check(module(x), oracle.linear(x, on_device, rounding), x)

    def check_experts(
        self,
        module: FP4Experts,
        x: Tensor,
        weights: ExpertsWeights,
        topk_ids: Tensor,
        topk_weights: Tensor,
        expert_map: Tensor | None = None,
    ) -> None:
        """The same for experts, x [T, k]."""
        expected = oracle.experts(
            x,
            on_device(weights, x.device),
            topk_ids,
            topk_weights,
            activation=self.case.activation,
            rounding=oracle.rounding_of(self.case.spec, self.case.scheme.name),
            expert_map=expert_map,
        )
        self._check(module(x, topk_ids, topk_weights, expert_map), expected, x)

    def _check(self, actual: Tensor, expected: oracle.Expected, x: Tensor) -> None:
        assert actual.dtype == self.dtype
        assert actual.device == x.device
        assert actual.shape == expected.values.shape
        case = self.case
        quantizes = oracle.rounding_of(case.spec, case.scheme.name) is not None
        allowed = tolerance(case.spec.op, case.scheme.weights.name, case.dtype, quantizes=quantizes)
        found = errors(actual, expected)
        assert found.within(allowed), f"{len(x)} rows: {found}, allowed {allowed}"

    def _resolution(self, problem: Problem) -> Resolution:
        resolution = ask(self.case.spec, problem, self.environment)
        if resolution.selected is None:
            own = next(c for c in resolution.candidates if c.spec is self.case.spec)
            # The check that it runs on this machine fails already, once.
            elsewhere = any(refusal.code.phase == "machine" for refusal in own.refusals)
            if elsewhere or {refusal.code for refusal in own.refusals} == {Code.LIMIT}:
                pytest.skip("; ".join(map(str, own.refusals)))
        resolution.chosen()
        if resolution.machine.device != self.environment.device.type:
            # A described machine, whose library's double computes on the device that is there.
            resolution = replace(resolution, machine=probe(str(self.environment.device)))
        return resolution


def on_device(weights: ExpertsWeights, device: torch.device) -> ExpertsWeights:
    """The same experts on a device."""
    gate = None if weights.gate is None else weights.gate.to(device)
    return replace(weights, gate=gate, up=weights.up.to(device), down=weights.down.to(device))


def matrices(weights: LinearWeights | ExpertsWeights) -> tuple[Matrix, ...]:
    """Every matrix of a layer."""
    return (weights.matrix,) if isinstance(weights, LinearWeights) else weights.matrices


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.ndim else bool(a == b)
