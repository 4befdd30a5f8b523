"""halfbyte runs FP4 checkpoints (NVFP4, MXFP4) on whatever accelerator is there, and says why it chose what it runs.

Importing it imports no torch and looks for no plugin; what needs torch is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halfbyte.decisions import Resolution, resolve
from halfbyte.errors import NO_TORCH, HalfbyteError, MissingExtraError
from halfbyte.machines import Machine, describe
from halfbyte.policies import Policy, policy
from halfbyte.problems import ExpertsProblem, LinearProblem
from halfbyte.schemes import Scheme
from halfbyte.specs import KernelSpec

if TYPE_CHECKING:
    from halfbyte.matrix import Matrix
    from halfbyte.models import load_model
    from halfbyte.modules import FP4Experts, FP4Linear
    from halfbyte.weights import ExpertsWeights, LinearWeights

__all__ = [
    "ExpertsProblem",
    "ExpertsWeights",
    "FP4Experts",
    "FP4Linear",
    "HalfbyteError",
    "KernelSpec",
    "LinearProblem",
    "LinearWeights",
    "Machine",
    "Matrix",
    "Policy",
    "Resolution",
    "Scheme",
    "describe",
    "load_model",
    "policy",
    "resolve",
]

_NEED_TORCH = {
    "ExpertsWeights": "halfbyte.weights",
    "FP4Experts": "halfbyte.modules",
    "FP4Linear": "halfbyte.modules",
    "LinearWeights": "halfbyte.weights",
    "Matrix": "halfbyte.matrix",
    "load_model": "halfbyte.models",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_NEED_TORCH[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError(NO_TORCH) from error


def __dir__() -> list[str]:
    return __all__
