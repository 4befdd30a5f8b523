"""What the library around a back end must be, asked when weights are prepared: the declarations cannot know it.

FlashInfer finds out at the first call and says it in its own words, after the checkpoint was packed.
"""

from __future__ import annotations

from flashinfer.gemm import gemm_base

from halfbyte.errors import PluginError

#: cuDNN's own version numbers: 9.10.2 computes FP4, 9.14 MXFP4 on SM12x, 9.23.1 NVFP4 weights with bfloat16.
CUDNN_FP4, CUDNN_MXFP4_SM12X, CUDNN_WEIGHT_ONLY = 91002, 91400, 92301


def require_cudnn(minimum: int, kernel_id: str) -> None:
    """PluginError saying what was found unless libcudnn is there in this version or a newer one."""
    if not gemm_base.CUDNN_AVAILABLE:
        raise _unmet(kernel_id, f"libcudnn {minimum}", "the module cudnn (nvidia-cudnn-frontend) cannot be imported")
    try:
        found = gemm_base.cudnn.backend_version()
    except Exception as error:  # the front end raises what its loader raises
        raise _unmet(kernel_id, f"libcudnn {minimum}", f"libcudnn does not load: {error}") from error
    if found < minimum:
        raise _unmet(kernel_id, f"libcudnn {minimum}", f"found {found}")


def require_cuda(major: int, minor: int, kernel_id: str) -> None:
    """PluginError saying what was found unless FlashInfer compiles for this CUDA release or a newer one."""
    found = gemm_base.get_cuda_version()
    if (found.major, found.minor) < (major, minor):
        raise _unmet(kernel_id, f"CUDA {major}.{minor}", f"found {found}")


def _unmet(kernel_id: str, needs: str, found: str) -> PluginError:
    return PluginError(
        f"kernel {kernel_id!r} needs {needs} or newer; {found}. To go on without it, set HALFBYTE_DENY={kernel_id}"
    )
