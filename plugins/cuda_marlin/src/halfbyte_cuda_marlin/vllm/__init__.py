"""vLLM's compiled Marlin, called without vLLM's Python."""
