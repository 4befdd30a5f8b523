"""An FP4 linear kernel for CPUs, offered to halfbyte as a plugin."""
