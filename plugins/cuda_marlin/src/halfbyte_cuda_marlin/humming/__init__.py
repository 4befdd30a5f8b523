"""marlin.humming: the kernels of the distribution humming-kernels."""
