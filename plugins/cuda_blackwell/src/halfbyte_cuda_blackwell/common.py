"""What the declarations of linear kernels and experts share. Torch-free."""

from __future__ import annotations

from typing import Final

#: The signatures that this plugin calls are those of 0.7.2; FlashInfer changes them between minor versions.
FLASHINFER: Final = "flashinfer-python>=0.7.2,<0.8"
#: As flashinfer-python 0.7.2 itself requires them. Its kernels in CuTe DSL and its cuDNN graphs do not run without.
CUTLASS_DSL: Final = "nvidia-cutlass-dsl>=4.6.2a0"
CUDNN_FRONTEND: Final = "nvidia-cudnn-frontend>=1.31"
INSTALL: Final = "pip install 'halfbyte[blackwell]'"
