"""FP4 kernels of FlashInfer for halfbyte, on NVIDIA Blackwell cards."""
