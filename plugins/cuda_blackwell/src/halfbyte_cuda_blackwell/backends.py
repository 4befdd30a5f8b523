"""FlashInfer's back ends for linear layers, as data: the declarations and the checks of every call read the same table.

Sources: flashinfer-python 0.7.2, `gemm/gemm_base.py` (the requirement functions of `mm_fp4`),
`gemm/gemm_bf16_fp4.py`, `csrc/fp4_gemm_cutlass.cu`. The tests compare it with the library's own answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from halfbyte_cuda_blackwell.common import CUDNN_FRONTEND, CUTLASS_DSL

#: Up to this many rows a back end that can reads activation scales in tiles of 8 rows.
FEW_ROWS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One back end of `mm_fp4`: where it runs, what it computes, what it wants of the tensors."""

    name: str
    #: CUDA compute capabilities, such as 100 or 121.
    capabilities: tuple[int, ...]
    formats: tuple[str, ...]
    #: Sizes that it takes; the library's own limits where they are wider are 8 (N of cute-dsl) and 1 (N of b12x).
    n_multiple: int
    k_multiple: int
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    #: Besides flashinfer-python.
    requires: tuple[str, ...] = ()
    #: Whether the rows of the weight and of its scales are shuffled for its epilogue.
    shuffles: bool = False
    #: Whether it reads the scales of few activation rows in tiles of 8 rows.
    small_tiles: bool = False

    def tile(self, rows: int) -> int:
        """Rows of one tile of activation scales."""
        return 8 if self.small_tiles and rows <= FEW_ROWS else 128


BACKENDS: Final = {
    backend.name: backend
    for backend in (
        Backend(
            name="cutlass",
            capabilities=(100, 103, 110, 120, 121),
            formats=("nvfp4",),
            n_multiple=32,
            k_multiple=32,
        ),
        Backend(
            name="cudnn",
            capabilities=(100, 103, 110, 120, 121),
            formats=("nvfp4", "mxfp4"),
            n_multiple=32,
            k_multiple=32,
            requires=(CUDNN_FRONTEND,),
        ),
        Backend(
            name="trtllm",
            capabilities=(100, 103),
            formats=("nvfp4",),
            n_multiple=128,
            k_multiple=64,
            dtypes=("bfloat16",),
            shuffles=True,
            small_tiles=True,
        ),
        Backend(
            name="cute-dsl",
            capabilities=(100, 103),
            formats=("nvfp4", "mxfp4"),
            n_multiple=32,
            k_multiple=32,
            requires=(CUTLASS_DSL,),
        ),
        Backend(
            name="b12x",
            capabilities=(120, 121),
            formats=("nvfp4", "mxfp4"),
            n_multiple=32,
            k_multiple=32,
            requires=(CUTLASS_DSL,),
        ),
    )
}

#: The back end of `mm_bf16_fp4` on each capability, and what that needs.
WEIGHT_ONLY: Final = {100: "cute-dsl", 103: "cute-dsl", 110: "cudnn", 120: "cute-dsl", 121: "cute-dsl"}
WEIGHT_ONLY_REQUIRES: Final = {"cute-dsl": CUTLASS_DSL, "cudnn": CUDNN_FRONTEND}
#: Sizes that every back end of `mm_bf16_fp4` takes: its tiles are 64 x 64.
WEIGHT_ONLY_MULTIPLE: Final = 64
