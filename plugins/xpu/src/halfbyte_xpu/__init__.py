"""FP4 kernels for halfbyte, on Intel GPUs."""
