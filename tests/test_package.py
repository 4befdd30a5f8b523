"""The public face of the package."""

import subprocess
import sys

import halfbyte


def test_everything_public_can_be_had_and_nothing_else():
    assert all(getattr(halfbyte, name) is not None for name in halfbyte.__all__)
    assert sorted(halfbyte.__all__) == halfbyte.__all__
    assert set(dir(halfbyte)) == set(halfbyte.__all__)


def test_importing_it_imports_no_torch_and_looks_for_no_plugin():
    code = (
        "import sys, importlib.metadata as m\n"
        "def no_discovery(**k): raise SystemExit('discovery')\n"
        "m.entry_points = no_discovery\n"
        "import halfbyte; halfbyte.Policy(require='reference')\n"
        "heavy = {'torch', 'transformers', 'rich', 'click', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_problem_can_be_resolved_in_one_line_under_a_context_manager():
    problem = halfbyte.LinearProblem(scheme=halfbyte.Scheme.parse("nvfp4-w4a16"), n=64, k=64)
    with halfbyte.policy(require="reference"):
        resolution = halfbyte.resolve(problem, halfbyte.describe("sm_90"))
    assert (resolution.chosen().spec.id, resolution.decided_by) == ("reference", "context manager require")
