"""Times of all kernels that can run a problem here: correctness first, and beside torch on dequantized weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import torch
from torch import Tensor

from halfbyte.benchmark.baseline import Layer, dense_layer
from halfbyte.benchmark.timing import Call, copies_needed, median_microseconds
from halfbyte.conformance import data, oracle
from halfbyte.conformance.tolerances import Errors, errors, tolerance
from halfbyte.decisions import Candidate, Resolution, State, machine_here, resolve
from halfbyte.errors import OutOfMemoryError, UsageError
from halfbyte.machines import Machine
from halfbyte.modules import FP4Experts, FP4Linear
from halfbyte.policies import Policy
from halfbyte.problems import DTYPES, ExpertsProblem, LinearProblem, Problem, dequantized_bytes
from halfbyte.refusals import Refusal
from halfbyte.specs import Rounding
from halfbyte.units import size_text
from halfbyte.weights import ExpertsWeights, LinearWeights

#: The name of the baseline: torch.nn.functional.linear on weights dequantized to the problem's dtype.
DENSE: Final = "torch (dense)"
#: Rows that are compared with the oracle, half of them the first and half the last.
_COMPARED: Final = 256

Weights: TypeAlias = LinearWeights | ExpertsWeights
Inputs: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One kernel at one number of rows; or one that cannot run, with its refusals (`m` and all numbers are None)."""

    kernel: str
    #: None for the baseline.
    state: State | None
    m: int | None = None
    #: The mean error against the float64 oracle, and what the conformance kit allows at most.
    error: float | None = None
    tolerance: float | None = None
    #: Whether the result is right (the worst error counts too); a kernel that is not is not timed.
    ok: bool = False
    median_us: float | None = None
    #: Time of the baseline / time of the kernel: above 1 is faster.
    ratio: float | None = None
    refusals: tuple[Refusal, ...] = ()
    #: What a kernel raised instead of a result.
    failure: str = ""


def bench(
    problem: Problem,
    ms: Sequence[int],
    *,
    device: str | None = None,
    policy: Policy | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[BenchRow]:
    """Compare and time, for every number of rows in `ms`, every kernel that is selected or outranked on this machine.

    The baseline comes first for each m, then the kernels in the order of their rank; the kernels that cannot or must
    not run come last. `progress` is called with what is being done. Times are medians in microseconds: on CUDA of
    graph replays over copies of the weights that exceed the L2 cache, elsewhere of repeated calls.
    UsageError for numbers of rows below 1 and for a device that is not there; OutOfMemoryError, before anything is
    made, for a problem whose weights or rows cannot fit.
    """
    if not ms or min(ms) < 1:
        raise UsageError(f"numbers of rows {list(ms)}; give some that are at least 1")
    machine = machine_here(device)
    _check_memory(problem, max(ms), machine)
    where = torch.empty(0, device=device or machine.device).device
    tell = progress or (lambda _: None)
    question = _Question.of(problem, where)
    resolution = resolve(problem, machine, policy)
    rows: list[BenchRow] = []
    with torch.inference_mode():
        tell(DENSE)
        size = dequantized_bytes(problem)
        baselines = _copies(
            dense_layer(problem, question.weights, question.dtype), size * question.read(min(ms)), where
        )
        dense = {m: question.row(DENSE, None, m, baselines, rounding=None) for m in ms}
        rows += dense.values()
        for candidate in resolution.candidates:
            tell(candidate.spec.id)
            rows += _kernel_rows(question, resolution, candidate, dense)
    order = {m: place for place, m in enumerate(dict.fromkeys(ms))}
    return sorted(rows, key=lambda row: len(order) if row.m is None else order[row.m])


def _check_memory(problem: Problem, rows: int, machine: Machine) -> None:
    widest = max(n + k for n, k in problem.matrices)
    needed = dequantized_bytes(problem) + rows * widest * DTYPES[problem.dtype]
    if machine.memory is not None and needed > machine.memory:
        raise OutOfMemoryError(
            f"{problem} with {rows} rows takes at least {size_text(needed)}; {machine} has {size_text(machine.memory)}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """A problem with weights on the device."""

    problem: Problem
    weights: Weights
    device: torch.device
    #: What should come out for m rows: the same for every kernel that rounds alike, and slow to find.
    _expected: dict[tuple[int, Rounding | None], oracle.Expected] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, device: torch.device) -> _Question:
        dtype = getattr(torch, problem.dtype)
        weights: Weights
        if isinstance(problem, LinearProblem):
            linear = data.linear_weights(problem.scheme, problem.n, problem.k, dtype=dtype, bias=problem.bias)
            weights = replace(linear, matrix=linear.matrix.to(device))
        else:
            experts = data.experts_weights(
                problem.scheme,
                problem.experts,
                problem.hidden,
                problem.intermediate,
                dtype=dtype,
                gated=problem.gated,
                bias=problem.bias,
                shared=problem.shared_global_scale is not False,
                input_scales=problem.input_scales or "one",
            )
            gate = None if experts.gate is None else experts.gate.to(device)
            weights = replace(experts, gate=gate, up=experts.up.to(device), down=experts.down.to(device))
        return cls(problem, weights, device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.problem.dtype)
        return dtype

    def inputs(self, m: int) -> Inputs:
        """Activations [m, K]; for experts also ids and weights [m, top_k]."""
        problem = self.problem
        k = problem.k if isinstance(problem, LinearProblem) else problem.hidden
        x = data.activations(m, k, self.dtype).to(self.device)
        if isinstance(problem, LinearProblem):
            return (x,)
        return (x, *(t.to(self.device) for t in data.routing(m, problem.experts, problem.top_k)))

    def read(self, m: int) -> float:
        """The share of the weights that m rows read: of experts, only those that are routed to."""
        if isinstance(self.problem, LinearProblem):
            return 1.0
        return min(1.0, m * self.problem.top_k / self.problem.experts)

    def measure(self, layer: Layer, inputs: Inputs, rounding: Rounding | None) -> Errors:
        """The errors of the first and last rows."""
        rows = len(inputs[0])
        some = torch.arange(rows, device=self.device)
        if rows > _COMPARED:
            some = torch.cat((some[: _COMPARED // 2], some[-_COMPARED // 2 :]))
        key = (rows, rounding)
        if key not in self._expected:
            self._expected[key] = self._oracle(tuple(tensor[some] for tensor in inputs), rounding)
        return errors(layer(*inputs)[some], self._expected[key])

    def _oracle(self, inputs: Inputs, rounding: Rounding | None) -> oracle.Expected:
        weights = self.weights
        if isinstance(weights, LinearWeights):
            return oracle.linear(inputs[0], weights, rounding)
        activation = getattr(self.problem, "activation", "")
        return oracle.experts(inputs[0], weights, inputs[1], inputs[2], activation=activation, rounding=rounding)

    def row(
        self,
        kernel: str,
        state: State | None,
        m: int,
        layers: Sequence[Layer],
        *,
        rounding: Rounding | None,
        dense: BenchRow | None = None,
    ) -> BenchRow:
        """Compare, and time what is right."""
        inputs = self.inputs(m)
        problem = self.problem
        allowed = tolerance(problem.op, problem.scheme.weights.name, problem.dtype, quantizes=rounding is not None)
        found = self.measure(layers[0], inputs, rounding)
        row = BenchRow(
            kernel=kernel, state=state, m=m, error=found.mean, tolerance=allowed.mean, ok=found.within(allowed)
        )
        if not row.ok:
            return row
        median = median_microseconds([_call(layer, inputs) for layer in layers], self.device)
        ratio = 1.0 if dense is None else None if dense.median_us is None else dense.median_us / median
        return replace(row, median_us=median, ratio=ratio)


def _kernel_rows(
    question: _Question, resolution: Resolution, candidate: Candidate, dense: dict[int, BenchRow]
) -> list[BenchRow]:
    name, state = candidate.spec.id, candidate.state
    if state not in (State.SELECTED, State.OUTRANKED):
        return [BenchRow(kernel=name, state=state, refusals=candidate.refusals)]
    rounding = oracle.rounding_of(candidate.spec, question.problem.scheme.name)
    try:
        layer = _layer(question, replace(resolution, selected=candidate))
        size = sum(buffer.nbytes for buffer in layer.buffers()) * question.read(min(dense))
        layers = _copies(layer, size, question.device)
    except Exception as error:
        return [BenchRow(kernel=name, state=state, failure=_text(error))]
    rows = []
    for m, baseline in dense.items():
        try:
            rows.append(question.row(name, state, m, layers, rounding=rounding, dense=baseline))
        except Exception as error:
            rows.append(BenchRow(kernel=name, state=state, m=m, failure=_text(error)))
    return rows


def _layer(question: _Question, resolution: Resolution) -> FP4Linear | FP4Experts:
    weights, problem = question.weights, question.problem
    if isinstance(weights, LinearWeights):
        return FP4Linear(weights, dtype=question.dtype, device=question.device, resolution=resolution)
    if not isinstance(problem, ExpertsProblem):
        raise UsageError(f"{problem} is no problem of experts")
    return FP4Experts(
        weights,
        top_k=problem.top_k,
        activation=problem.activation,
        dtype=question.dtype,
        device=question.device,
        resolution=resolution,
    )


def _copies(layer: Layer, size: float, device: torch.device) -> list[Layer]:
    return [layer, *(copy.deepcopy(layer) for _ in range(copies_needed(size, device) - 1))]


def _call(layer: Layer, inputs: Inputs) -> Call:
    return lambda: layer(*inputs)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
