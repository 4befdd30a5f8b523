"""Kernels of vllm-xpu-kernels: `xpu.fp4-gemm` and `xpu.fused-moe`."""
