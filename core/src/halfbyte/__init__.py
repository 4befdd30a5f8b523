"""halfbyte runs FP4 checkpoints (NVFP4, MXFP4) on whatever accelerator is there."""
