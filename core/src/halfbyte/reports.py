"""Reports: decisions as JSON-ready data and as tables. The data is the primary form; tables are a rendering of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.decisions import Candidate, Resolution
from halfbyte.groups import LayerGroup, ModelResolution
from halfbyte.specs import Fidelity, KernelSpec, Proof
from halfbyte.units import size_text


@dataclass(frozen=True, slots=True)
class Table:
    """A table to be rendered: a title, column heads, rows of texts."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def resolution_data(resolution: Resolution) -> dict[str, Any]:
    """One problem's answer as JSON-ready data."""
    return {
        "problem": resolution.problem.to_dict(),
        "machine": resolution.machine.to_dict(),
        "selected": _selected_id(resolution),
        "decided_by": resolution.decided_by,
        "candidates": [_candidate_data(candidate) for candidate in resolution.candidates],
    }


def model_data(model: ModelResolution) -> dict[str, Any]:
    """A checkpoint's answer as JSON-ready data."""
    return {
        "checkpoint": str(model.plan.path),
        "machine": model.machine.to_dict(),
        "groups": [_group_data(group) for group in model.groups],
        "unquantized": [tensor.name for tensor in model.plan.unquantized],
        "bytes": model.bytes,
        "fits": model.fits,
        "notes": list(model.plan.notes),
    }


def kernel_counts(resolutions: Iterable[Resolution]) -> dict[str, int]:
    """How many layers each chosen kernel runs, given the resolution of every layer."""
    return dict(Counter(_selected_id(resolution) or "none" for resolution in resolutions))


def summary(resolutions: Iterable[Resolution]) -> str:
    """One line: which kernels run how many layers of which scheme, and what each then computes."""
    counts = Counter(
        (resolution.problem.scheme.name, chosen.spec.id, fidelity_text(chosen))
        for resolution in resolutions
        if (chosen := resolution.selected) is not None
    )
    return "; ".join(
        f"{scheme}: {count} layer{'s' * (count != 1)} on {kernel} ({how})"
        for (scheme, kernel, how), count in counts.items()
    )


def resolution_tables(resolution: Resolution) -> list[Table]:
    """One problem's answer: what was asked and chosen, then every candidate."""
    chosen = _selected_id(resolution) or "nothing can run this"
    facts = [
        ("problem", str(resolution.problem)),
        ("machine", str(resolution.machine)),
        ("selected", chosen),
        ("decided by", resolution.decided_by),
    ]
    return [Table("", ("", ""), facts), candidates_table(resolution)]


def model_tables(model: ModelResolution, *, every_layer: bool) -> list[Table]:
    """A checkpoint's answer: its groups, each group's candidates, and memory."""
    tables = [
        Table(
            "",
            ("", ""),
            [
                ("checkpoint", str(model.plan.path)),
                ("machine", str(model.machine)),
                ("unquantized", f"{len(model.plan.unquantized)} tensors, {size_text(model.plan.unquantized_bytes)}"),
                ("in memory", _memory_text(model)),
                *(("note", note) for note in model.plan.notes),
            ],
        )
    ]
    for number, group in enumerate(model.groups, 1):
        names = group.layers if every_layer else _patterns(group.layers)
        facts = [
            ("problem", str(group.resolution.problem)),
            ("selected", _selected_id(group.resolution) or "nothing can run this"),
            ("decided by", group.resolution.decided_by),
            ("in memory", size_text(group.bytes)),
            *((f"{len(group.layers)} layers" if first else "", name) for first, name in _first_marked(names)),
        ]
        tables += [Table(f"group {number} of {len(model.groups)}", ("", ""), facts), candidates_table(group.resolution)]
    return tables


def _memory_text(model: ModelResolution) -> str:
    taken, there = size_text(model.bytes), model.machine.memory
    if there is None:
        return taken
    return f"{taken} of {size_text(there)}{'' if model.fits else ': does not fit'}"


def candidates_table(resolution: Resolution) -> Table:
    """Every candidate of one problem."""
    columns = ("kernel", "plugin", "state", "fidelity", "proof", "priority", "per layer", "why not")
    rows = [
        (
            candidate.spec.id,
            candidate.plugin,
            candidate.state.value,
            str(candidate.fidelity or "-"),
            proof_text(candidate.proof),
            str(candidate.priority),
            size_text(candidate.bytes),
            "\n".join(map(str, candidate.refusals)) or "-",
        )
        for candidate in resolution.candidates
    ]
    return Table("", columns, rows)


def proofs_text(spec: KernelSpec) -> str:
    """Everything that a kernel's declaration says of its proof, device by device."""
    texts = [f"{pattern}: {proof_text(proof)}" for pattern, proof in spec.proofs]
    everywhere = any(pattern == "any" for pattern, _ in spec.proofs)
    return "; ".join(texts if everywhere else [*texts, f"else: {proof_text(Proof.NONE)}"])


def proof_text(proof: Proof) -> str:
    """A proof level in words; says so where a kernel never ran on the hardware it is for."""
    if proof is Proof.HARDWARE:
        return "run on hardware"
    return "not run on hardware" if proof is Proof.NONE else f"not run on hardware ({proof})"


def fidelity_text(candidate: Candidate) -> str:
    """The candidate's fidelity; says so where a W4A4 checkpoint runs weight-only."""
    if candidate.fidelity is Fidelity.WEIGHT_ONLY:
        return "weight-only: activations are not quantized"
    return str(candidate.fidelity)


def _candidate_data(candidate: Candidate) -> dict[str, Any]:
    return {
        "kernel": candidate.spec.id,
        "plugin": candidate.plugin,
        "state": candidate.state.value,
        "fidelity": candidate.fidelity,
        "proof": candidate.proof.value,
        "priority": candidate.priority,
        "bytes": candidate.bytes,
        "refusals": [refusal.to_dict() for refusal in candidate.refusals],
    }


def _group_data(group: LayerGroup) -> dict[str, Any]:
    data = resolution_data(group.resolution)
    data.pop("machine")
    return {"layers": list(group.layers), **data, "bytes": group.bytes}


def _selected_id(resolution: Resolution) -> str | None:
    return None if resolution.selected is None else resolution.selected.spec.id


def _patterns(names: Sequence[str]) -> list[str]:
    """Layer names with their numbers starred out, each with its count."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return [f"{pattern} x {count}" for pattern, count in counts.items()]


def _first_marked(names: Iterable[str]) -> Iterable[tuple[bool, str]]:
    return ((index == 0, name) for index, name in enumerate(names))
