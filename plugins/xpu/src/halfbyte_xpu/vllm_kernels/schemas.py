"""The operators of vllm-xpu-kernels that we call, and whether an installed wheel has them. Torch-free.

Importing the package proves nothing: on a machine without its libraries that succeeds and registers no operator. So the
schemas are looked up in the bytes of its shared libraries, where their registration put them as plain text.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

DISTRIBUTION: Final = "vllm-xpu-kernels"
PACKAGE: Final = "vllm_xpu_kernels"


@dataclass(frozen=True, slots=True)
class Op:
    """One operator: the library that registers it (also its namespace), and its schema as registered."""

    library: str
    schema: str

    @property
    def name(self) -> str:
        """The operator's name without its namespace."""
        return self.schema.partition("(")[0]

    def __str__(self) -> str:
        return f"{self.library}::{self.name}"


QUANTIZE: Final = Op(
    "_C",
    "per_token_group_quant_mxfp4(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps) -> ()",
)
FP4_GEMM: Final = Op(
    "_xpu_C",
    "fp4_gemm(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType? out_dtype, Tensor? bias_) -> Tensor",
)
GROUPED_GEMM: Final = Op(
    "_xpu_C",
    "cutlass_grouped_gemm_interface(Tensor ptr_A, Tensor? ptr_A_scale, Tensor ptr_B, Tensor? ptr_B_scale, "
    "Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, int N, int K, int num_experts) -> Tensor",
)
IS_XE2: Final = Op("_xpu_C", "is_xe2_arch(int device_index=-1) -> bool")
IS_XE3: Final = Op("_xpu_C", "is_xe3_arch(int device_index=-1) -> bool")
REMAP: Final = Op(
    "_moe_C",
    "remap_hidden_states(Tensor hidden_states, Tensor? hidden_states_scales, Tensor remapped_hidden_states,"
    "Tensor? remapped_hidden_states_scales,Tensor? expert_map, Tensor rows_per_expert,"
    "Tensor unpermuted_row_to_permuted_row, Tensor topk_ids,int total_experts_num, int local_experts_num) -> ()",
)
GATHER: Final = Op(
    "_moe_C",
    "moe_gather(Tensor! output, Tensor moe_output, Tensor topk_weights, Tensor unpermuted_row_to_permuted_row, "
    "int num_experts) -> ()",
)
#: XpuFusedMoe's activation functions, by our names.
ACTIVATION_OPS: Final = {
    "silu": Op("_C", "silu_and_mul(Tensor! result, Tensor input) -> ()"),
    "gelu_tanh": Op("_C", "gelu_tanh_and_mul(Tensor! out, Tensor input) -> ()"),
    "swigluoai": Op("_C", "swigluoai_and_mul(Tensor! out, Tensor input, float alpha=1.702, float limit=7.0) -> ()"),
    "relu2": Op("_C", "relu2_no_mul(Tensor! out, Tensor! input) -> ()"),
}
LINEAR_OPS: Final = (QUANTIZE, FP4_GEMM)
EXPERTS_OPS: Final = (GROUPED_GEMM, IS_XE2, IS_XE3, REMAP, GATHER, *ACTIVATION_OPS.values())


@cache
def faults(ops: tuple[Op, ...], version: str) -> tuple[str, ...]:
    """What is wrong with the installed wheel of this version; empty if nothing is, or that version is not installed.

    One version has the same bytes everywhere, so this is still an answer about the version.
    """
    try:
        installed = distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return ()
    if installed.version != version:
        return ()
    return tuple(fault for op in ops if (fault := _fault(installed, op)))


def read_schema(library: Path, name: str) -> str | None:
    """The schema of an operator in a shared library's bytes; None if it registers none of this name."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(b"\0" + name.encode() + b"(")
        if start < 0:
            return None
        stop = content.find(b"\0", start + 1)
        return content[start + 1 : stop].decode("utf-8", "replace")


def same_schema(a: str, b: str) -> bool:
    """Whether two schemas are equal but for spaces."""
    return re.sub(r"\s", "", a) == re.sub(r"\s", "", b)


def _fault(installed: Distribution, op: Op) -> str:
    library = Path(str(installed.locate_file(f"{PACKAGE}/{op.library}.abi3.so")))
    if not library.is_file():
        return f"it has no {op.library}.abi3.so, which registers {op}"
    found = read_schema(library, op.name)
    if found is None:
        return f"{op.library}.abi3.so registers no {op}"
    return "" if same_schema(found, op.schema) else f"{op} is {found!r} there; this plugin calls {op.schema!r}"
