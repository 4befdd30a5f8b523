"""Finding and loading vLLM's libraries, what is said where that fails, and what is refused before."""

import ctypes.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from halfbyte.eligibility import refusals_for
from halfbyte.errors import PluginError
from halfbyte.kernels import load_kernel
from halfbyte.machines import describe
from halfbyte.problems import ExpertsProblem, LinearProblem
from halfbyte.refusals import Code
from halfbyte.schemes import NVFP4_W4A16
from halfbyte_cuda_marlin.vllm import library
from halfbyte_cuda_marlin.vllm.requirements import requirements
from halfbyte_cuda_marlin.vllm.specs import SPECS
from support import vllm_double

LINEAR, EXPERTS = SPECS
PROBLEM = LinearProblem(scheme=NVFP4_W4A16, n=4096, k=4096)
NO_VLLM = pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
MOE = ExpertsProblem(scheme=NVFP4_W4A16, experts=8, top_k=2, hidden=512, intermediate=512)


@pytest.fixture(autouse=True)
def forget():
    library.operator.cache_clear()
    yield
    library.operator.cache_clear()


def install(site: Path, *requires: str, version: str = "0.26.0") -> Path:
    """A vllm that must not be imported; its package's folder."""
    info, package = site / f"vllm-{version}.dist-info", site / "vllm"
    for folder in (info, package):
        folder.mkdir(parents=True)
    lines = ("Metadata-Version: 2.1", "Name: vllm", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires))
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (package / "__init__.py").write_text("raise SystemExit('vllm was imported')\n", encoding="utf-8")
    return package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed vllm 0.26.0, which names torch 2.11."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return install(tmp_path, "torchaudio==2.11.0", "torch==2.11.0", 'torch==9; extra == "other"', "numpy")


@NO_VLLM
def test_without_vllm_the_kernel_is_an_error_that_says_how_to_install_it():
    with pytest.raises(
        PluginError, match=r"marlin.vllm.*vllm is not installed; pip install 'vllm>=0.26'.*HALFBYTE_DENY"
    ):
        load_kernel(LINEAR)


def test_a_vllm_without_libraries_is_an_error_that_says_where_they_were_looked_for(package: Path):
    with pytest.raises(
        PluginError, match=rf"vllm 0.26.0 has no compiled library _moe_C\*.so in {package}; .* for CUDA"
    ):
        library.operator("_moe_C::moe_sum")


def test_a_library_that_does_not_load_is_an_error_that_names_both_torches(package: Path):
    (package / "_C_stable_libtorch.abi3.so").write_bytes(b"no library")
    with pytest.raises(PluginError) as error:
        library.operator("_C::marlin_gemm")
    text = str(error.value)
    assert "_C_stable_libtorch.abi3.so of vllm 0.26.0 does not load" in text
    assert f"built for torch==2.11.0, and torch {torch.__version__} is installed" in text


def test_a_library_without_the_operator_is_an_error_that_says_which_releases_have_it(package: Path):
    some = ctypes.util.find_library("m")
    if some is None:
        pytest.skip("no library is there to stand for vLLM's")
    own = next(path for folder in ("/lib", "/usr/lib", "/lib64") for path in Path(folder).rglob(some))
    shutil.copy(own, package / "_C_stable_libtorch.abi3.so")
    with pytest.raises(PluginError, match=r"vllm 0.26.0 has no operator _C::marlin_gemm; .* 0.26 to 0.33"):
        library.operator("_C::marlin_gemm")


def test_an_operator_that_is_there_already_is_taken():
    with vllm_double.installed("0.33.0"):
        assert library.operator("_moe_C::moe_sum") is torch.ops._moe_C.moe_sum.default


def test_the_torch_that_vllm_names_is_required_beside_it(package: Path):
    assert package.is_dir()
    assert requirements() == ("vllm>=0.26", "torch==2.11.0")


@NO_VLLM
def test_without_vllm_it_alone_is_required():
    assert requirements() == ("vllm>=0.26",)


@pytest.mark.parametrize(
    ("packages", "codes"),
    [
        ({"torch": "2.11.0+cu130"}, [Code.PACKAGE_MISSING]),
        ({"vllm": "0.26.0", "torch": "2.13.0"}, [Code.PACKAGE_VERSION]),
        ({"vllm": "0.24.0", "torch": "2.11.0"}, [Code.PACKAGE_VERSION]),
        ({"vllm": "0.26.0", "torch": "2.11.0+cu130"}, []),
    ],
)
@pytest.mark.usefixtures("package")
def test_it_is_refused_by_metadata_alone(packages: dict[str, str], codes: list[Code]):
    for spec, problem in ((LINEAR, PROBLEM), (EXPERTS, MOE)):
        own = replace(spec, requires=requirements())
        refusals = refusals_for(own, problem, describe("sm_90").with_packages(packages))
        assert [refusal.code for refusal in refusals] == codes


def test_bfloat16_is_refused_on_turing_and_float16_is_not():
    for spec, problem in ((LINEAR, PROBLEM), (EXPERTS, MOE)):
        (refusal,) = refusals_for(spec, problem, describe("sm_75"))
        assert (refusal.code, "bfloat16" in refusal.detail) == (Code.LIMIT, True)
        assert not refusals_for(spec, replace(problem, dtype="float16"), describe("sm_75"))
        assert not refusals_for(spec, problem, describe("sm_80"))


def test_more_experts_than_can_be_sorted_are_refused():
    assert not refusals_for(EXPERTS, replace(MOE, experts=992), describe("sm_90"))
    assert [r.code for r in refusals_for(EXPERTS, replace(MOE, experts=993), describe("sm_90"))] == [Code.LIMIT]


def test_nothing_imports_vllm(tmp_path: Path):
    install(tmp_path, "torch==2.11.0")
    program = (
        "import sys\n"
        "from halfbyte_cuda_marlin.vllm.specs import SPECS\n"
        "assert 'torch' not in sys.modules, 'the declaration imports torch'\n"
        "assert SPECS[0].requires == ('vllm>=0.26', 'torch==2.11.0'), SPECS[0].requires\n"
        "from halfbyte.errors import PluginError\n"
        "from halfbyte_cuda_marlin.vllm import experts, linear\n"
        "for made in (linear.MarlinVllm, experts.MarlinVllmExperts):\n"
        "    try:\n"
        "        made()\n"
        "    except PluginError as error:\n"
        "        print(error)\n"
        "assert 'vllm' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("has no compiled library") == 2
