"""intel-extension-for-pytorch, where it really has FP4: `xpu.ipex`."""
