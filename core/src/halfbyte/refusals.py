"""Refusals: why a kernel does not serve a problem. A closed set of codes; docs/refusals.md is generated from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from halfbyte.errors import UsageError


class Code(StrEnum):
    """Every reason there is. `phase` says where it arises, `meaning` and `remedy` are its documentation."""

    phase: str
    meaning: str
    remedy: str

    def __new__(cls, value: str, phase: str, meaning: str, remedy: str) -> Code:
        """Make a member that carries its own documentation."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.phase, member.meaning, member.remedy = phase, meaning, remedy
        return member

    # Not on this machine: the candidate is `ineligible`.
    DEVICE = (
        "device",
        "machine",
        "The kernel does not run on this kind of device.",
        "Ask for another machine, or use a kernel whose devices include this one.",
    )
    PACKAGE_MISSING = (
        "package-missing",
        "machine",
        "A distribution that the kernel needs is not installed.",
        "Install it with the line in the hint.",
    )
    PACKAGE_VERSION = (
        "package-version",
        "machine",
        "A distribution that the kernel needs is installed in a version that it was not made for.",
        "Install a version in the range named.",
    )
    CHECK_FAILED = (
        "check-failed",
        "machine",
        "What the kernel declares to be called (its check, its bytes) failed, so nothing is known of it.",
        "Report the error named in the detail to the plugin's authors.",
    )
    # Not for this problem: the candidate is `ineligible`.
    SCHEME = (
        "scheme",
        "problem",
        "The kernel does not compute this scheme.",
        "Use a kernel that lists the scheme; docs/support.md has the table.",
    )
    DTYPE = (
        "dtype",
        "problem",
        "The kernel does not take activations of this dtype.",
        "Load the model in one of the dtypes named.",
    )
    N_MULTIPLE = (
        "n-multiple",
        "problem",
        "The output size is not a multiple of what the kernel needs, and it does not allow padding.",
        "Use another kernel for this layer.",
    )
    K_MULTIPLE = (
        "k-multiple",
        "problem",
        "The input size is not a multiple of what the kernel needs, and it does not allow padding.",
        "Use another kernel for this layer.",
    )
    BIAS = (
        "bias",
        "problem",
        "The experts have biases and the kernel cannot add them inside.",
        "Use another kernel for this layer.",
    )
    ACTIVATION = (
        "activation",
        "problem",
        "The kernel does not compute this activation function of the experts.",
        "Use a kernel that lists the activation.",
    )
    GLOBAL_SCALES = (
        "global-scales",
        "problem",
        "Gate and up have different global scales that cannot be folded into the block scales exactly, "
        "and the kernel takes one scale for both.",
        "Use a kernel with one global scale for each projection.",
    )
    INPUT_SCALES = (
        "input-scales",
        "problem",
        "The calibrated input scales of the experts differ, and the kernel takes one for all of them: with the largest "
        "it would round other activations than the checkpoint asks.",
        "Use a kernel that takes each expert's own, or calibrate the checkpoint so that all experts share one.",
    )
    LIMIT = (
        "limit",
        "problem",
        "The problem is outside a limit of the kernel's own.",
        "The detail has the limit.",
    )
    # Could run, but is not allowed to: the candidate is `blocked`.
    DENIED = (
        "denied",
        "policy",
        "The user denied this kernel.",
        "Remove it from the deny list named in the detail.",
    )
    NOT_REQUIRED = (
        "not-required",
        "policy",
        "The user requires another kernel.",
        "Change the requirement named in the detail.",
    )
    OPT_IN = (
        "opt-in",
        "policy",
        "The kernel is never chosen by itself.",
        "Require or prefer it by name.",
    )
    KNOWN_BAD = (
        "known-bad",
        "policy",
        "The kernel is known to fail or to give wrong results in this combination; the detail has the public thread.",
        "Upgrade to the version named, or require the kernel by name to run it all the same.",
    )
    FIDELITY = (
        "fidelity",
        "policy",
        "The kernel's fidelity for this scheme is worse than the policy allows.",
        "Allow it with HALFBYTE_FIDELITY or the argument `fidelity`.",
    )
    ACTIVATIONS = (
        "activations",
        "policy",
        "The kernel would quantize activations that the checkpoint keeps in 16 or 32 bits.",
        "Allow it with HALFBYTE_ACTIVATIONS=allow-quantized if the loss of accuracy is acceptable.",
    )
    WEIGHTS = (
        "weights",
        "policy",
        "The kernel keeps its weights in another form than was decided: packed, or dequantized at load.",
        "Choose the form with the argument `weights`.",
    )
    MEMORY = (
        "memory",
        "policy",
        "The kernel's weights alone need more memory than the machine has.",
        "Use a kernel that keeps the weights packed, or a device with more memory.",
    )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a kernel does not serve a problem: the code, what was found, what to do (by default, the code's remedy)."""

    code: Code
    detail: str
    hint: str = ""

    def __post_init__(self) -> None:
        if not self.detail:
            raise UsageError(f"a refusal needs a detail that says what was found (code {self.code})")
        if not self.hint:
            object.__setattr__(self, "hint", self.code.remedy)

    def to_dict(self) -> dict[str, str]:
        """The refusal as JSON-ready data."""
        return {**asdict(self), "code": self.code.value}

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"
