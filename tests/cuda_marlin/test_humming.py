"""marlin.humming over a double of its library; what it declares, refuses and chooses."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from halfbyte import describe
from halfbyte.eligibility import refusals_for
from halfbyte.errors import PluginError
from halfbyte.problems import LinearProblem
from halfbyte.refusals import Code
from halfbyte.schemes import SCHEMES
from halfbyte_cuda_marlin.humming import launching, library, schedule
from halfbyte_cuda_marlin.humming.experts import by_expert
from halfbyte_cuda_marlin.humming.packing import Gemm
from halfbyte_cuda_marlin.humming.specs import SPECS
from support import humming_double

TESTS = Path(__file__).parents[1]
LINEAR = SPECS[0]
PROBLEM = LinearProblem(scheme=SCHEMES["nvfp4-w4a16"], n=4096, k=4096)
#: At "1", humming starts no processes when it is imported (humming/ops/utils.py, utils/nvrtc.py).
BACKGROUND = "HUMMING_DISABLE_PARALLEL_BUILD"
INSTALLED = {"humming-kernels": "0.1.19", "torch": "2.11.0", "triton": "3.6.0"}


@pytest.fixture
def double(monkeypatch):
    """The library's double, and nothing compiled."""
    humming_double.install(monkeypatch.setitem, monkeypatch.setattr)
    library.library.cache_clear()
    launching._kernels.cache_clear()
    yield humming_double
    library.library.cache_clear()
    launching._kernels.cache_clear()


def test_it_passes_the_kit_over_the_double():
    command = (
        "-q -x -p no:cacheprovider -p halfbyte.conformance -p support.humming_double --pyargs halfbyte.conformance"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command.split(), "--kernel", "marlin.humming"],
        capture_output=True,
        text=True,
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert "passed" in done.stdout


@pytest.mark.parametrize(
    ("packages", "code"),
    [
        ({}, Code.PACKAGE_MISSING),
        ({"humming-kernels": "0.1.18"}, Code.PACKAGE_VERSION),
        ({"humming-kernels": "0.2.0"}, Code.PACKAGE_VERSION),
        ({"torch": "2.10.0"}, Code.PACKAGE_VERSION),
    ],
)
def test_it_refuses_a_machine_without_the_library_that_it_was_made_for(packages: dict[str, str], code: Code):
    here = INSTALLED | packages if packages else {"torch": "2.11.0", "triton": "3.6.0"}
    (refusal,) = refusals_for(LINEAR, PROBLEM, describe("sm_90").with_packages(here))
    assert refusal.code is code
    assert "halfbyte-cuda-marlin[humming]" in refusal.hint


def test_it_refuses_cards_that_it_was_not_made_for():
    def codes(arch: str, dtype: str) -> list[Code]:
        problem = LinearProblem(scheme=PROBLEM.scheme, n=64, k=64, dtype=dtype)
        return [refusal.code for refusal in refusals_for(LINEAR, problem, describe(arch))]

    assert codes("sm_75", "bfloat16") == [Code.LIMIT]
    assert codes("sm_75", "float16") == codes("sm_80", "bfloat16") == codes("sm_90", "bfloat16") == []
    assert codes("sm_100", "bfloat16") == [Code.DEVICE]


def test_explaining_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from halfbyte_cuda_marlin.humming.specs import SPECS\n"
        "print([name for name in ('torch', 'triton', 'humming') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_import_starts_no_compilation_of_its_own(double, monkeypatch):
    seen: list[str | None] = []

    def load(name: str) -> object:
        seen.append(os.environ.get(BACKGROUND))
        return sys.modules[name]

    monkeypatch.delenv(BACKGROUND, raising=False)
    monkeypatch.setattr("halfbyte_cuda_marlin.humming.library.import_module", load)
    library.library()
    assert set(seen) == {"1"}
    assert BACKGROUND not in os.environ


def test_what_the_library_raises_is_told_with_what_to_do(double, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no suitable CUDA 13 environment found")

    monkeypatch.setattr(double.HummingKernel, "prepare_kernels", fails)
    gemm = Gemm(128, 128, PROBLEM.scheme.weights, "bfloat16")
    with pytest.raises(PluginError, match=r"compile its kernels for .*no suitable CUDA 13.*humming-kernels\[cu13\]"):
        launching._kernels(gemm, torch.device("cpu"))


def test_lack_of_memory_stays_what_it_is():
    with pytest.raises(torch.OutOfMemoryError), library.told("pack a matrix"):
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("k", [128, 384, 4096])
@pytest.mark.parametrize("n", [128, 384, 4096, 28672])
def test_every_number_of_rows_has_one_kernel_that_divides_the_matrix_and_does_not_split_k(n: int, k: int):
    ranges = schedule.dense(n, k, 132)
    ends = [end for _, end, _ in ranges]
    assert [above for above, _, _ in ranges] == [0, *ends[:-1]]
    assert ends == sorted(set(ends))
    assert ends[-1] > 1 << 24
    for _, _, config in ranges:
        rows, columns, depth = config["block_shape"]
        warp_rows, warp_columns, warp_depth = config["warp_shape"]
        assert not config["use_stream_k"]
        assert n % columns == k % depth == rows % warp_rows == columns % warp_columns == depth % warp_depth == 0
        assert config["mma_type"] != "wgmma" or columns // warp_columns % 4 == 0


def test_few_rows_of_a_small_matrix_are_spread_over_the_card():
    configs = {end: config["block_shape"] for _, end, config in schedule.dense(4096, 4096, 132)}
    rows, columns, _ = next(iter(configs.values()))
    assert (rows, columns) == (8, 64)
    assert next(iter(schedule.dense(28672, 4096, 132)))[2]["block_shape"][1] == 128


def test_ranges_with_one_choice_become_one():
    ranges = schedule.ranges((8, 16, 32), lambda rows: {"block_shape": [16 if rows > 8 else 8]})
    assert [(above, end, config["block_shape"]) for above, end, config in ranges] == [
        (0, 8, [8]),
        (8, 1 << 30, [16]),
    ]


def test_slots_are_sorted_by_expert_and_those_of_none_come_last():
    slots = torch.tensor([3, -1, 0, 3, -1, 2, 0], dtype=torch.int32)
    order, starts = by_expert(slots, 5)
    assert order.tolist() == [2, 6, 5, 0, 3, 1, 4]
    assert starts.tolist() == [0, 2, 2, 3, 5, 5]
    assert starts.dtype == torch.int32


def test_the_signatures_are_those_of_the_installed_library():
    try:
        files = {str(file): file for file in metadata.files("humming-kernels") or ()}
    except metadata.PackageNotFoundError:
        pytest.skip("humming-kernels is not installed")
    if metadata.version("humming-kernels") != "0.1.19":
        pytest.skip("the signatures are those of 0.1.19")
    for path, name in (
        ("humming/ops/launcher.py", "humming.ops.launch_kernel"),
        ("humming/transform.py", "humming.transform.transform_humming_tensors"),
        ("humming/transform.py", "humming.transform.prepare_fp16_e8m0_scale"),
        ("humming/tune/__init__.py", "humming.tune.get_heuristics_config"),
        ("humming/kernel/humming.py", "humming.kernel.humming.HummingKernel.prepare_kernels"),
        ("humming/config/config.py", "humming.config.LayerConfig"),
        ("humming/config/config.py", "humming.config.TuningConfig"),
    ):
        found = signature(ast.parse(files[path].read_text()), name.rpartition(".")[2])
        assert found == humming_double.SIGNATURES[name], name


def signature(tree: ast.Module, name: str) -> dict[str, str | None]:
    """The parameters of a function, or the fields of a dataclass, with their defaults; None: required."""
    node = next(n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
    if isinstance(node, ast.ClassDef):
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and "ClassVar" not in ast.unparse(f.annotation)]
        return {ast.unparse(f.target): _text(f.value) for f in fields}
    every = node.args
    names = [a.arg for a in every.args if a.arg != "cls"]
    defaults = [None] * (len(names) - len(every.defaults)) + list(every.defaults)
    pairs = [
        *zip(names, defaults, strict=True),
        *zip((a.arg for a in every.kwonlyargs), every.kw_defaults, strict=True),
    ]
    return {key: _text(default) for key, default in pairs}


def _text(value: ast.expr | None) -> str | None:
    return None if value is None else ast.unparse(value)
