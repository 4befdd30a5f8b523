"""The command line."""

from halfbyte.cli.main import main

__all__ = ["main"]
