"""Which kernel runs experts on which machine, in all four schemes: golden files, and the table of docs/blackwell.md."""

from __future__ import annotations

from typing import Any

import pytest

from cuda_blackwell.goldens import MACHINES_OF, decisions, file_of
from halfbyte import Policy, describe, resolve
from halfbyte.problems import ExpertsProblem
from halfbyte.schemes import SCHEMES

#: Qwen3-30B-A3B's layers, and gpt-oss-20b's.
QWEN3: dict[str, Any] = {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768}
GPT_OSS: dict[str, Any] = {
    "experts": 32,
    "top_k": 4,
    "hidden": 2880,
    "intermediate": 2880,
    "activation": "swigluoai",
    "bias": True,
}
#: The first of ours on each machine; the rest is core's.
DOCUMENTED = {
    "sm_89": ("cutile", "cutile", "cutile", "cutile", None),
    "sm_90": ("cutile", "cutile", "cutile", "cutile", None),
    "sm_100": ("cutlass", "cute-dsl-a16", "trtllm", "trtllm", "trtllm"),
    "sm_103": ("cutlass", "cute-dsl-a16", None, None, None),
    "sm_110": (None, None, None, None, None),
    "sm_120": ("b12x", "cutile", "b12x", "cutile", None),
    "sm_121": ("cutlass", "cutile", "cutile", "cutile", None),
}


@pytest.mark.parametrize("machine", MACHINES_OF["experts"])
def test_the_decisions_for_experts_are_the_golden_ones(machine: str):
    assert decisions("experts", machine) == file_of("experts", machine).read_text(encoding="utf-8")


@pytest.mark.parametrize("machine", DOCUMENTED)
def test_the_documented_kernel_leads(machine: str):
    schemes = ("nvfp4-w4a4", "nvfp4-w4a16", "mxfp4-w4a4", "mxfp4-w4a16", "mxfp4-w4a16")
    for scheme, sizes, kernel in zip(schemes, (*[QWEN3] * 4, GPT_OSS), DOCUMENTED[machine], strict=True):
        problem = ExpertsProblem(scheme=SCHEMES[scheme], **sizes)
        able = [
            candidate.spec.id.removeprefix("flashinfer.")
            for candidate in resolve(problem, describe(machine)).candidates
            if candidate.state in ("selected", "outranked") and candidate.spec.id.startswith("flashinfer.")
        ]
        assert able[:1] == ([] if kernel is None else [kernel]), (scheme, able)


def test_what_is_known_to_fail_is_blocked_with_its_thread_and_runs_where_it_is_required_by_name():
    problem, machine, kernel_id = ExpertsProblem(scheme=SCHEMES["nvfp4-w4a4"], **QWEN3), "sm_121", "flashinfer.b12x"
    own = next(one for one in resolve(problem, describe(machine)).candidates if one.spec.id == kernel_id)
    assert own.state == "blocked"
    assert "https://github.com/flashinfer-ai/flashinfer/issues/3170" in str(own.refusals[0])
    assert resolve(problem, describe(machine), Policy(require=kernel_id)).chosen().spec.id == kernel_id


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ({}, "needs flashinfer-python>=0.7.2,<0.8, which is not installed"),
        ({"flashinfer-python": "0.8.0"}, "flashinfer-python 0.8.0 is installed"),
    ],
)
def test_the_library_absent_or_of_another_version_is_said(installed: dict[str, str], found: str):
    problem = ExpertsProblem(scheme=SCHEMES["nvfp4-w4a4"], **QWEN3)
    resolution = resolve(problem, describe("sm_100").with_packages(installed))
    ours = [one for one in resolution.candidates if one.spec.id.startswith("flashinfer.")]
    assert ours
    assert all(found in "; ".join(map(str, one.refusals)) for one in ours)
