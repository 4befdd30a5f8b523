"""Plugins for tests of the conformance kit: kernels with one fault each, and one that needs a vendor's library."""
