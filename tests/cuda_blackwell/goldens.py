"""Golden files of decisions: what `halfbyte explain --machine NAME` answers, one line for each scheme and kernel.

`python -m cuda_blackwell.goldens linear` (in tests/) writes those of an op anew; read the difference before it is kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from click.testing import CliRunner

from halfbyte.cli import main
from halfbyte.schemes import SCHEMES

MACHINES = ("sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
#: Experts of cuTile run on Hopper too.
MACHINES_OF = {"linear": MACHINES, "experts": ("sm_90", *MACHINES)}
PROBLEMS = {
    "linear": ("--shape", "4096x4096"),
    "experts": ("--experts", "128", "--top-k", "8", "--hidden", "2048", "--intermediate", "768"),
}
FOLDER = Path(__file__).parent / "golden"


def file_of(op: str, machine: str) -> Path:
    return FOLDER / f"{machine}.{op}.txt"


def decisions(op: str, machine: str) -> str:
    """Every scheme's candidates of this plugin and of core, in the order of their rank."""
    lines = []
    for scheme in SCHEMES:
        arguments = ("explain", "--op", op, "--scheme", scheme, *PROBLEMS[op], "--machine", machine, "--json")
        answer = json.loads(CliRunner().invoke(main, arguments, catch_exceptions=False).stdout)
        lines += [f"{scheme}: {answer['selected']}"]
        for one in answer["candidates"]:
            if one["plugin"] in ("halfbyte", "cuda-blackwell"):
                codes = ", ".join(refusal["code"] for refusal in one["refusals"])
                words = (one["state"], one["fidelity"] or "-", one["proof"], str(one["priority"]), codes)
                lines.append(f"  {one['kernel']}: {' '.join(words).strip()}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        for arch in MACHINES_OF[asked]:
            file_of(asked, arch).write_text(decisions(asked, arch), encoding="utf-8")
