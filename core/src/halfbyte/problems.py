"""Problems: one layer to run, without its numbers. Frozen, hashable, torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import lcm
from typing import Any, ClassVar, Final, Literal, TypeAlias

from halfbyte.errors import UsageError, nearest
from halfbyte.schemes import Scheme

DTYPES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Expert activation functions. relu2 has no gate; swigluoai is gpt-oss's, with alpha 1.702 and limit 7.
ACTIVATIONS: Final = ("silu", "gelu_tanh", "relu2", "swigluoai")
#: The calibrated input scales of experts: each expert's own; one for x (gate and up of all experts) and each expert's
#: own for the hidden activations (down); one for x and one for the hidden activations.
InputScales: TypeAlias = Literal["per-expert", "one-for-x", "one"]
#: From the most numbers to the fewest: a kernel takes what it declares and all that follows.
INPUT_SCALES: Final[tuple[InputScales, ...]] = ("per-expert", "one-for-x", "one")


def _check_common(scheme: Scheme, dtype: str, k_sizes: dict[str, int], sizes: dict[str, int]) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}")
    for name, size in {**sizes, **k_sizes}.items():
        if size <= 0:
            raise UsageError(f"{name} is {size}; it must be positive")
    group = scheme.weights.group_size
    for name, size in k_sizes.items():
        if size % group:
            raise UsageError(f"{name}={size} is not a multiple of {scheme.weights}'s group of {group}")


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem:
    """y = x @ W.T + b with W [n, k] in the scheme's weight format and x [M, k] in `dtype`."""

    op: ClassVar[str] = "linear"
    scheme: Scheme
    n: int
    k: int
    dtype: str = "bfloat16"
    bias: bool = False

    def __post_init__(self) -> None:
        _check_common(self.scheme, self.dtype, {"K": self.k}, {"N": self.n})

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of every weight matrix."""
        return ((self.n, self.k),)

    def padded(self, n_multiple: int, k_multiple: int) -> LinearProblem:
        """The same problem with N and K rounded up; K also to the format's group."""
        k_multiple = lcm(k_multiple, self.scheme.weights.group_size)
        return replace(self, n=round_up(self.n, n_multiple), k=round_up(self.k, k_multiple))

    def to_dict(self) -> dict[str, Any]:
        """The problem as JSON-ready data."""
        return {"op": self.op, **asdict(self), "scheme": self.scheme.name}

    def __str__(self) -> str:
        return f"linear {self.scheme} {self.n}x{self.k} {self.dtype}{' bias' if self.bias else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsProblem:
    """The experts of one mixture-of-experts layer: gate and up [I, H], activation, down [H, I], weighted sum.

    The routing is given. `hidden` is H, `intermediate` is I, `experts` counts those of this rank: with an expert map
    `top_k` may be more.
    """

    op: ClassVar[str] = "experts"
    scheme: Scheme
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    dtype: str = "bfloat16"
    activation: str = "silu"
    bias: bool = False
    #: Whether one global scale, and one input scale if they have any, serves gate and up of each expert exactly; None:
    #: not known yet, nothing is refused.
    shared_global_scale: bool | None = None
    #: Which experts share input scales; None: not known yet, or the activations have none. Nothing is refused.
    input_scales: InputScales | None = None

    def __post_init__(self) -> None:
        _check_common(
            self.scheme,
            self.dtype,
            {"hidden": self.hidden, "intermediate": self.intermediate},
            {"experts": self.experts, "top_k": self.top_k},
        )
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"unknown activation {self.activation!r}{nearest(self.activation, ACTIVATIONS)}")
        if self.input_scales is not None and self.input_scales not in INPUT_SCALES:
            raise UsageError(f"unknown input_scales {self.input_scales!r}{nearest(self.input_scales, INPUT_SCALES)}")

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate projection (all but relu2 do)."""
        return self.activation != "relu2"

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of every weight matrix of every expert: gate (if gated), up, down."""
        up = (self.intermediate, self.hidden)
        one = (*((up,) if self.gated else ()), up, (self.hidden, self.intermediate))
        return one * self.experts

    def without_facts(self) -> ExpertsProblem:
        """The same problem with nothing known of the numbers in the weights."""
        return replace(self, shared_global_scale=None, input_scales=None)

    def padded(self, n_multiple: int, k_multiple: int) -> ExpertsProblem:
        """The same problem with hidden and intermediate rounded up: each of them is an N and a K."""
        both = lcm(n_multiple, k_multiple, self.scheme.weights.group_size)
        return replace(self, hidden=round_up(self.hidden, both), intermediate=round_up(self.intermediate, both))

    def to_dict(self) -> dict[str, Any]:
        """The problem as JSON-ready data."""
        return {"op": self.op, **asdict(self), "scheme": self.scheme.name}

    def __str__(self) -> str:
        return (
            f"experts {self.scheme} E={self.experts} top-{self.top_k} H={self.hidden} I={self.intermediate} "
            f"{self.activation} {self.dtype}{' bias' if self.bias else ''}"
        )


Problem: TypeAlias = LinearProblem | ExpertsProblem
OPS: Final = (LinearProblem.op, ExpertsProblem.op)


def packed_bytes(problem: Problem) -> int:
    """Bytes of the problem's weights as a checkpoint stores them; biases in the problem's dtype."""
    fmt = problem.scheme.weights
    matrices = problem.matrices
    weights = sum(fmt.packed_bytes(n, k) for n, k in matrices)
    return weights + (4 * len(matrices) if fmt.has_global_scale else 0) + bias_bytes(problem)


def dequantized_bytes(problem: Problem) -> int:
    """Bytes of the problem's weights dequantized to its dtype, biases included."""
    return sum(n * k for n, k in problem.matrices) * DTYPES[problem.dtype] + bias_bytes(problem)


def bias_bytes(problem: Problem) -> int:
    """Bytes of the problem's biases in its dtype."""
    return sum(n for n, _ in problem.matrices) * DTYPES[problem.dtype] if problem.bias else 0
