"""Every error that halfbyte raises on purpose.

HalfbyteError
├── UsageError          the question itself is wrong: an unknown name, a bad value (also a ValueError)
├── CheckpointError     a checkpoint that cannot be read; names the file and the tensor (also a ValueError)
├── PluginError         a plugin that failed, raised only under HALFBYTE_STRICT=1
├── NoKernelError       no kernel can run the problem; the message lists every candidate and refusal
├── BrokenModelError    the model computes NaN
├── OutOfMemoryError    the estimate does not fit the device
└── MissingExtraError   an optional package is needed; the message has the install line (also an ImportError)
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final


class HalfbyteError(Exception):
    """Base of all errors that halfbyte raises on purpose."""


class UsageError(HalfbyteError, ValueError):
    """The question is wrong: an unknown name, or a value outside its range."""


class CheckpointError(HalfbyteError, ValueError):
    """The checkpoint cannot be read as what it claims to be."""


class PluginError(HalfbyteError):
    """A plugin failed and HALFBYTE_STRICT=1 asked for that to be an error."""


class NoKernelError(HalfbyteError):
    """No kernel can run the problem."""


class OutOfMemoryError(HalfbyteError):
    """The estimated bytes do not fit the device; raised before anything is loaded."""


class BrokenModelError(HalfbyteError):
    """The model computes NaN."""


class MissingExtraError(HalfbyteError, ImportError):
    """An optional package is needed for this."""


#: What to say where torch is needed and missing.
NO_TORCH: Final = "this needs torch, which is not installed; https://pytorch.org has the install line for your device"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `name`, or what is known if none is near."""
    names = sorted(set(known))
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names) or 'none'}"
