"""The built-in kernels: pure torch on any device, linear and experts, every scheme; the lowest rank."""
