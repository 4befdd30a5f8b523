"""Marlin-class weight-only FP4 kernels for halfbyte, on CUDA cards without FP4 units."""
