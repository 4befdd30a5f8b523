"""The compiled parts of FlashInfer's experts kernels, byte for byte, in plain torch on a CPU."""
