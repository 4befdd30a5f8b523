"""Every kernel compiles for every architecture that it is declared for; no card is needed."""

import re
import sys

import pytest

from halfbyte.machines import ARCHES, describe, matches
from halfbyte_cuda_marlin.cuda import dense, experts_small, experts_wide, nvrtc, pair, routing, small, wide
from halfbyte_cuda_marlin.cuda.cards import Card
from halfbyte_cuda_marlin.cuda.specs import SPECS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC's library is installed for the tests on Linux")

(LINEAR,) = (spec for spec in SPECS if spec.op == "linear")
DECLARED = [arch for arch in ARCHES if any(matches(pattern, describe(arch)) for pattern in LINEAR.devices)]
SIZES = (256, 32, 2304, 132)
#: Registers that a thread which multiplies asks for, by warpgroups, as REGS in ring.cuh; one that fetches keeps 32.
MULTIPLYING, FETCHING = {2: 232, 3: 160, 4: 112}, 32


@pytest.fixture(autouse=True)
def _compile_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nvrtc.machine_code.cache_clear()


@pytest.mark.parametrize("arch", DECLARED)
def test_the_kernels_for_any_card_compile(arch: str):
    few = small.macros(16, small.plan(16, *SIZES), mxfp4=False, bf16=True, bulk=Card(arch, 132).bulk)
    assert nvrtc.machine_code("small", arch, few)[:4] == b"\x7fELF"
    assert nvrtc.machine_code("dense", arch, dense.macros(mxfp4=True, bf16=False))[:4] == b"\x7fELF"
    assert nvrtc.machine_code("pack", arch, ())[:4] == b"\x7fELF"


@pytest.mark.parametrize(("mxfp4", "bf16"), [(False, True), (True, False)])
def test_the_kernels_for_hopper_compile(mxfp4: bool, bf16: bool):
    plan = pair.plan(8, *SIZES)
    assert plan is not None
    assert nvrtc.machine_code("pair", "sm_90a", pair.macros(8, plan, mxfp4=mxfp4, bf16=bf16))[:4] == b"\x7fELF"


@pytest.mark.parametrize(("mxfp4", "bf16"), [(False, True), (True, False)])
@pytest.mark.parametrize("shape", wide.SHAPES)
def test_the_kernel_for_many_rows_compiles_for_every_shape_of_its_items(
    shape: tuple[int, int], mxfp4: bool, bf16: bool
):
    options = wide.macros(wide.division(shape, 1, 32, 256, 2304, 132), mxfp4=mxfp4, bf16=bf16)
    code = nvrtc.machine_code("wide", "sm_90a", options)
    assert code[:4] == b"\x7fELF"
    assert_warpgroups_get_their_registers(code, shape[1])


@pytest.mark.parametrize(("mxfp4", "bf16", "act"), [(False, True, 1), (True, False, 3)])
def test_the_kernels_of_experts_compile(mxfp4: bool, bf16: bool, act: int):
    kinds = {"mxfp4": mxfp4, "bf16": bf16}
    few = experts_small.macros(experts_small.KINDS[0], **kinds, act=act, gather=True)
    many = experts_wide.macros(experts_wide.plan(4096, 8, None, *SIZES), **kinds, act=act)
    for kernel, macros in (
        ("experts_small", few),
        ("experts_wide", many),
        ("route", routing.macros(wide=True, bf16=bf16)),
    ):
        assert nvrtc.machine_code(kernel, "sm_90a", macros)[:4] == b"\x7fELF"


@pytest.mark.parametrize("rows", experts_wide.SHAPES)
def test_the_warpgroups_of_experts_get_the_registers_that_they_ask_for(rows: int):
    for shape in experts_wide.SHAPES[rows]:
        own = experts_wide.Plan(rows, shape.groups, shape.stages, shape.buffers, 1, 1, 0)
        code = nvrtc.machine_code("experts_wide", "sm_90a", experts_wide.macros(own, mxfp4=False, bf16=True, act=1))
        assert_warpgroups_get_their_registers(code, shape.groups)


def assert_warpgroups_get_their_registers(code: bytes, groups: int) -> None:
    """A launch gives as many registers as its warpgroups then ask for; else the kernel hangs."""
    counts = re.findall(rb"\x04\x2f\x08\x00.{4}(.{4})", code, re.DOTALL)  # EIATTR_REGCOUNT: of a thread at launch
    assert len(counts) == 1
    given = int.from_bytes(counts[0], "little") * (groups + 1)
    assert MULTIPLYING[groups] * groups + FETCHING <= given


def test_code_for_a_virtual_architecture_is_text_that_the_driver_compiles():
    code = nvrtc.machine_code("dense", "compute_80", dense.macros(mxfp4=False, bf16=True))
    assert b".target sm_80" in code
    assert code.endswith(b"\0")
