"""What a kernel is tried on: every scheme, dtype and activation that it declares, at and off its alignments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm
from typing import Final

from halfbyte.problems import round_up
from halfbyte.schemes import SCHEMES, Scheme
from halfbyte.specs import KernelSpec

#: Rows of x, tokens.
ROWS: Final = (0, 1, 2, 3, 7, 127, 129)
EXPERTS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel and one question to it. For experts, n is the intermediate size and k the hidden one."""

    spec: KernelSpec
    scheme: Scheme
    dtype: str
    n: int
    k: int
    activation: str = ""

    @property
    def name(self) -> str:
        """What pytest calls it."""
        activation = f"-{self.activation}" if self.activation else ""
        return f"{self.spec.id}-{self.scheme}-{self.dtype}-{self.n}x{self.k}{activation}"


def linear_cases(spec: KernelSpec) -> Iterator[Case]:
    """Every scheme and dtype at aligned sizes, the smallest ones, and sizes off both alignments."""
    for aligned in linear_settings(spec):
        n_unit, k_unit = spec.n_multiple, lcm(spec.k_multiple, aligned.scheme.weights.group_size)
        yield aligned
        yield replace(aligned, n=n_unit, k=k_unit)
        if spec.pads:
            yield replace(aligned, n=aligned.n + 1, k=aligned.k + aligned.scheme.weights.group_size)
        else:
            yield replace(aligned, n=aligned.n + n_unit, k=aligned.k + k_unit)


def linear_settings(spec: KernelSpec) -> Iterator[Case]:
    """Every scheme and dtype at aligned sizes."""
    for scheme in (SCHEMES[name] for name in spec.schemes):
        n = round_up(64, spec.n_multiple)
        k = round_up(128, lcm(spec.k_multiple, scheme.weights.group_size))
        for dtype in spec.dtypes:
            yield Case(spec=spec, scheme=scheme, dtype=dtype, n=n, k=k)


def experts_cases(spec: KernelSpec) -> Iterator[Case]:
    """Every scheme, dtype and activation at aligned sizes, and every scheme off the alignment."""
    for aligned in _experts_settings(spec):
        for activation in spec.activations:
            yield replace(aligned, activation=activation)
    for aligned in one_of_each_scheme(_experts_settings(spec)):
        step = aligned.scheme.weights.group_size if spec.pads else _experts_unit(aligned)
        yield replace(aligned, n=aligned.n + step, k=aligned.k + step)


def experts_settings(spec: KernelSpec) -> Iterator[Case]:
    """Every scheme with one dtype and one activation, at aligned sizes."""
    return one_of_each_scheme(_experts_settings(spec))


def one_of_each_scheme(cases: Iterator[Case]) -> Iterator[Case]:
    """The first case of every scheme."""
    seen: set[Scheme] = set()
    for case in cases:
        if case.scheme not in seen:
            seen.add(case.scheme)
            yield case


def _experts_settings(spec: KernelSpec) -> Iterator[Case]:
    for scheme in (SCHEMES[name] for name in spec.schemes):
        for dtype in spec.dtypes:
            case = Case(spec=spec, scheme=scheme, dtype=dtype, n=1, k=1, activation=spec.activations[0])
            unit = _experts_unit(case)
            yield replace(case, n=round_up(160, unit), k=round_up(64, unit))


def _experts_unit(case: Case) -> int:
    return lcm(case.spec.n_multiple, case.spec.k_multiple, case.scheme.weights.group_size)
