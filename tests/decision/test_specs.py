"""A declaration that makes no sense is refused when it is made, naming the kernel."""

from typing import Any

import pytest

from halfbyte.errors import UsageError
from halfbyte.refusals import Code, Refusal
from halfbyte.specs import Fidelity, KnownBad
from support.specs import kernel


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "Bad Id"}, "id must be"),
        ({"op": "conv"}, "unknown op 'conv'"),
        ({"target": "no_colon"}, "package.module:Class"),
        ({"schemes": {}}, "schemes is empty"),
        ({"schemes": {"nvfp4-w4a8": Fidelity.NATIVE}}, "nvfp4-w4a"),
        ({"schemes": {"nvfp4-w4a4": "perfect"}}, "fidelity 'perfect'"),
        ({"devices": ()}, "devices is empty"),
        ({"devices": ("gpu",)}, "device pattern"),
        ({"dtypes": ("bf16",)}, "unknown dtype 'bf16'"),
        ({"requires": ("vendor lib",)}, "requirement"),
        ({"global_scales": "per-expert"}, "global_scales"),
        ({"input_scales": "one-for-all"}, "input_scales"),
        ({"n_multiple": 0}, "at least 1"),
        ({"dtypes": ()}, "dtypes is empty"),
        ({"devices": ("xpu-foo",)}, "no such family"),
        ({"priority": "300"}, "priority '300'"),
        ({"priority": None}, "priority None"),
        ({"keeps": "zipped"}, "keeps 'zipped'"),
        ({"activation_rounding": "even"}, "activation_rounding"),
        ({"proof": {"cpu": "ran"}}, "proof 'ran'"),
        ({"known_bad": (KnownBad(effect="x", thread="y", devices=("sm",)),)}, "device pattern"),
        ({"op": "experts", "activations": ()}, "activations"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        kernel(**fields)


def test_a_refusal_without_a_detail_cannot_be_made():
    with pytest.raises(UsageError, match="detail"):
        Refusal(Code.DEVICE, "")


def test_every_code_says_what_it_means_and_what_to_do():
    assert all(code.meaning and code.remedy and code.phase in ("machine", "problem", "policy") for code in Code)


def test_fidelities_are_ordered_best_first():
    assert [f.rank for f in Fidelity] == [0, 1, 2, 3]
    assert Fidelity.NATIVE.rank < Fidelity.QUANTIZES_ACTIVATIONS.rank
