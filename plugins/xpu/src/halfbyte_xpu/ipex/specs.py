"""What `xpu.ipex` declares. Torch-free: importing a build that does not match torch ends the process."""

from __future__ import annotations

from typing import Final

from packaging.version import Version

from halfbyte.machines import Machine
from halfbyte.problems import Problem
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity, KernelSpec, Proof
from halfbyte_xpu.devices import NO_XETLA, without_fp4
from halfbyte_xpu.known_bad import KNOWN_BAD

DISTRIBUTION: Final = "intel-extension-for-pytorch"
#: The only release with MXFP4 that is for a torch with which halfbyte runs (2.10), and its last:
#: https://github.com/intel/intel-extension-for-pytorch, tag v2.10.10+xpu.
_FIRST: Final = Version("2.10.10")
_BUILD: Final = "build it with IPEX_VERSION=2.10.10+xpu"
_INSTALL: Final = (
    "build intel-extension-for-pytorch v2.10.10+xpu from source with IPEX_VERSION=2.10.10+xpu set: no wheel of it was "
    "published, and without that variable the build is named after a commit"
)
_ACTIVATIONS: Final = ("silu", "gelu_tanh", "swigluoai", "relu2")


def mismatches(ipex: str, torch: str | None) -> list[str]:
    """Why this build has no FP4 or would not load beside this torch (None: not known); versions with local tags."""
    own, found = Version(ipex), []
    tag = own.local or "cpu"
    if tag.startswith("cpu"):
        found.append(f"{DISTRIBUTION} {ipex} is a CPU build, which has no FP4")
    elif not tag.startswith("xpu"):
        found.append(f"{DISTRIBUTION} {ipex}: its version does not say that it was built for Intel GPUs; {_BUILD}")
    elif own < _FIRST:
        found.append(f"{DISTRIBUTION} {ipex} is too old: FP4 beside a torch that halfbyte runs with needs {_FIRST}+xpu")
    if torch is not None and Version(torch).release[:2] != own.release[:2]:
        needed = ".".join(map(str, own.release[:2]))
        found.append(f"{DISTRIBUTION} {ipex} cannot be imported beside torch {torch}: it needs torch {needed}")
    return found


def _check(problem: Problem, machine: Machine) -> list[Refusal]:  # noqa: ARG001 - what a check is called with
    packages = dict(machine.packages or ())
    version = packages.get(DISTRIBUTION)
    wrong = [] if version is None else mismatches(version, packages.get("torch"))
    return [*without_fp4(machine, NO_XETLA), *(Refusal(Code.PACKAGE_VERSION, detail, _INSTALL) for detail in wrong)]


SPECS: Final = tuple(
    KernelSpec(
        id="xpu.ipex",
        op=op,
        target=f"halfbyte_xpu.ipex.{op}:{name}",
        # Its FP4 kernels are of XeTLA, which nothing says was ever built for Panther Lake.
        devices=("xpu-pvc", "xpu-bmg", "xpu-lnl"),
        requires=(f"{DISTRIBUTION}>={_FIRST}", "torch>=2.10"),
        install=_INSTALL,
        schemes={"mxfp4-w4a16": Fidelity.NATIVE, "mxfp4-w4a4": Fidelity.WEIGHT_ONLY},
        dtypes=("bfloat16",),
        # Its two-dimensional block loads want rows of 64 bytes; scales have one byte for each column.
        n_multiple=64,
        fuses_bias=op == "experts",
        activations=_ACTIVATIONS if op == "experts" else (),
        priority=205,
        auto=False,
        proof=Proof.CONTRACT_DOUBLE,
        known_bad=KNOWN_BAD["xpu.ipex"],
        check=_check,
    )
    for op, name in (("linear", "IpexLinear"), ("experts", "IpexExperts"))
)
