"""On a card: compare the vendor's quantizer with its rule for every bfloat16 amax; `quantizer.py RESULT.json`.

A process of its own, since it loads the vendor's libraries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from halfbyte import numerics
from halfbyte.errors import PluginError
from halfbyte.formats import MXFP4
from halfbyte_xpu.vllm_kernels.library import load
from halfbyte_xpu.vllm_kernels.ops import quantize_mxfp4
from halfbyte_xpu.vllm_kernels.schemas import LINEAR_OPS

#: E8M0 code of 2**-33: smaller scales are raised to it, and other codes with them.
FLOOR = 94


def main() -> None:
    """Write how many scales and codes differ, or why the library cannot be asked."""
    result: dict[str, Any]
    try:
        load(LINEAR_OPS)
    except (ImportError, OSError, PluginError) as error:
        result = {"skipped": f"vllm-xpu-kernels does not load: {error}"}
    else:
        result = compare(torch.device("xpu"))
    Path(sys.argv[1]).write_text(json.dumps(result), encoding="utf-8")


def compare(device: torch.device) -> dict[str, Any]:
    """Quantize a group of 32 for each positive finite number as the largest, there and by halfbyte's numerics."""
    numbers = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = (numbers.double()[:, None] * torch.linspace(-1, 1, 32, dtype=torch.float64)).to(torch.bfloat16)
    packed, scales = (tensor.cpu() for tensor in quantize_mxfp4(x.to(device)))
    values, codes = numerics.quantize(x, MXFP4, scale_rule="ceil", ties="toward-zero")
    differ = scales != codes.clamp(min=FLOOR)
    comparable = (codes >= FLOOR).repeat_interleave(32, -1)
    wrong = (numerics.decode_packed(packed) != numerics.decode_packed(values)) & comparable
    return {
        "scales that differ": int(differ.sum()),
        "codes that differ": int(wrong.sum()),
        "first": numbers[differ.any(1) | wrong.any(1)][:8].tolist(),
    }


if __name__ == "__main__":
    main()
