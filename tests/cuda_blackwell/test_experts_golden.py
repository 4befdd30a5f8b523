"""Which kernel runs experts on which machine, in all four schemes, compared with golden files.

Only this plugin's kernels and the built-in ones are listed, whatever else is installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte import describe, resolve
from halfbyte.problems import ExpertsProblem
from halfbyte.schemes import SCHEMES

GOLDEN = Path(__file__).parent / "golden"
MACHINES = ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
#: Qwen3-30B-A3B, and gpt-oss-20b in MXFP4.
QWEN3 = {"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768, "activation": "silu"}
GPT_OSS = {"experts": 32, "top_k": 4, "hidden": 2880, "intermediate": 2880, "activation": "swigluoai", "bias": True}


def listing(machine: str) -> str:
    lines = []
    for scheme in SCHEMES.values():
        for name, sizes in (("Qwen3", QWEN3), *((("gpt-oss", GPT_OSS),) if scheme.name == "mxfp4-w4a16" else ())):
            problem = ExpertsProblem(scheme=scheme, **sizes)
            lines.append(f"{scheme} {name}")
            for candidate in resolve(problem, describe(machine)).candidates:
                spec = candidate.spec
                if spec.id.startswith("flashinfer.") or spec.id in ("reference", "dequantized"):
                    why = "; ".join(f"{refusal.code}: {refusal.detail}" for refusal in candidate.refusals)
                    state = "can run" if candidate.state in ("selected", "outranked") else candidate.state
                    words = (f"{spec.id:20}", f"{state:10}", f"{candidate.fidelity or '-':21}", why)
                    lines.append("  " + " ".join(words).rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("machine", MACHINES)
def test_the_kernels_for_experts_are_the_documented_ones(machine: str):
    assert listing(machine) == (GOLDEN / f"{machine}.experts.txt").read_text(encoding="utf-8")
