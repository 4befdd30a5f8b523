"""The whole conformance kit, as a part of this plugin's tests."""

from __future__ import annotations

import subprocess
import sys


def test_the_kernel_passes_the_conformance_kit() -> None:
    kit = ("-p", "halfbyte.conformance", "--pyargs", "halfbyte.conformance", "--kernel", "outsider.lut")
    command = (sys.executable, "-m", "pytest", "-q", *kit)
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
    assert done.returncode == 0, done.stdout
