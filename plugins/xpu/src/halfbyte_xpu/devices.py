"""Which Intel GPUs have FP4 at all, and why the others have not. Torch-free."""

from __future__ import annotations

from typing import Final

from halfbyte.machines import Machine
from halfbyte.refusals import Code, Refusal

#: Families on which oneDNN computes with f4_e2m1 (by up-conversion: memory is saved, not time), and which
#: vllm-xpu-kernels counts as Xe2 or Xe3 (its is_xe2_arch includes Ponte Vecchio).
#: https://uxlfoundation.github.io/oneDNN/dev_guide_data_types.html
WITH_FP4: Final = ("xpu-pvc", "xpu-bmg", "xpu-lnl", "xpu-ptl")
#: What oneDNN and vllm-xpu-kernels lack on the others; the name of the family goes in.
NO_FP4: Final = "oneDNN has no f4_e2m1 on {}, not even by up-conversion, and vllm-xpu-kernels is for Xe2 and Xe3"
NO_XETLA: Final = "its XeTLA kernels need both XMX and two-dimensional block loads, which {} has not"

_WITHOUT: Final = {
    "xpu-acm": "Alchemist (Xe-HPG)",
    "xpu-mtl": "Meteor Lake (Xe-LPG)",
    "xpu-arl": "Arrow Lake (Xe-LPG+)",
}


def without_fp4(machine: Machine, why: str = NO_FP4) -> list[Refusal]:
    """Why this Intel GPU has no FP4, if it is one that has none."""
    name = _WITHOUT.get(machine.arch)
    if name is None:
        return []
    hint = "use the built-in kernels, which dequantize: they run on every device"
    return [Refusal(Code.DEVICE, why.format(name), hint)]
