"""What tests that run Python in a process of its own share."""

from __future__ import annotations

import os


def python_path(*first: object) -> str:
    """PYTHONPATH with these folders first, then those that this process was given: the same code is tested there."""
    return os.pathsep.join((*map(str, first), *filter(None, (os.environ.get("PYTHONPATH"),))))
