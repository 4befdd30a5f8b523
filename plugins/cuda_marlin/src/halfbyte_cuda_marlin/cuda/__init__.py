"""Our own kernels: CUDA C++ compiled at run time, no library beside torch and NVRTC."""
