"""The compiled parts of FlashInfer, byte for byte, in plain torch on a CPU; its Python code above them is the real one.

`arithmetic` computes, `compiled` are the doubles of the modules, `patches` puts them in place, `kit` is the pytest
plugin that runs the conformance kit over them, `faults` are the faults that the kit has to find.
"""
