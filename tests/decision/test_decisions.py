"""`decide`: ranking, refusals, policies, and what it says of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.decisions import Resolution, State, decide
from halfbyte.errors import NoKernelError, UsageError
from halfbyte.machines import ARCHES, describe
from halfbyte.policies import Policy
from halfbyte.problems import ExpertsProblem, InputScales, LinearProblem
from halfbyte.refusals import Code, Refusal
from halfbyte.schemes import MXFP4_W4A4, NVFP4_W4A4, NVFP4_W4A16, SCHEMES, Scheme
from halfbyte.specs import Fidelity, KernelSpec, KnownBad, PriorityRule, Proof
from support.specs import kernel, plugged

CPU = describe("cpu")
HOPPER = describe("sm_90")
PROBLEM = LinearProblem(scheme=NVFP4_W4A16, n=64, k=64)
EXPERTS = ExpertsProblem(scheme=NVFP4_W4A4, experts=4, top_k=2, hidden=64, intermediate=64)


def with_input_scales(found: InputScales) -> ExpertsProblem:
    return replace(EXPERTS, input_scales=found)


def codes(resolution: Resolution, kernel_id: str = "test.kernel") -> list[Code]:
    (candidate,) = [c for c in resolution.candidates if c.spec.id == kernel_id]
    return [refusal.code for refusal in candidate.refusals]


def selected(resolution: Resolution) -> str | None:
    return resolution.selected.spec.id if resolution.selected else None


def test_the_highest_priority_wins_and_ties_go_to_the_first_id():
    answer = decide(
        PROBLEM, CPU, plugged(kernel("c", priority=5), kernel("b", priority=900), kernel("a", priority=900))
    )
    assert selected(answer) == "a"
    assert answer.decided_by == "priority"
    assert [(c.spec.id, c.state) for c in answer.candidates] == [
        ("a", State.SELECTED),
        ("b", State.OUTRANKED),
        ("c", State.OUTRANKED),
    ]


@given(order=st.permutations(["a", "b", "c", "d"]), arch=st.sampled_from(ARCHES))
def test_the_order_of_discovery_changes_nothing(order: list[str], arch: str):
    specs = {i: kernel(i, priority=7 if i in "ad" else 8) for i in "abcd"}
    answer = decide(PROBLEM, describe(arch), plugged(*(specs[i] for i in order)))
    assert [c.spec.id for c in answer.candidates] == ["b", "c", "a", "d"]


def test_priority_may_depend_on_device_and_scheme():
    table = (
        PriorityRule(priority=400, devices=("sm_100..",), schemes=("nvfp4-*",)),
        PriorityRule(priority=50),
    )
    spec = kernel(priority=table)
    assert spec.priority_for(describe("sm_120"), "nvfp4-w4a4") == 400
    assert spec.priority_for(describe("sm_120"), "mxfp4-w4a4") == 50
    assert spec.priority_for(HOPPER, "nvfp4-w4a4") == 50


@pytest.mark.parametrize(
    ("spec", "problem", "code"),
    [
        (kernel(devices=("sm_100..",)), PROBLEM, Code.DEVICE),
        (kernel(schemes={"mxfp4-w4a16": Fidelity.NATIVE}), PROBLEM, Code.SCHEME),
        (kernel(dtypes=("float16",)), PROBLEM, Code.DTYPE),
        (kernel(pads=False, n_multiple=128), PROBLEM, Code.N_MULTIPLE),
        (kernel(pads=False, k_multiple=128), PROBLEM, Code.K_MULTIPLE),
        (kernel(op="experts", activations=("relu2",)), EXPERTS, Code.ACTIVATION),
        (
            kernel(op="experts", fuses_bias=False),
            ExpertsProblem(scheme=NVFP4_W4A4, experts=4, top_k=2, hidden=64, intermediate=64, bias=True),
            Code.BIAS,
        ),
        (
            kernel(op="experts", global_scales="per-expert"),
            ExpertsProblem(
                scheme=NVFP4_W4A4, experts=4, top_k=2, hidden=64, intermediate=64, shared_global_scale=False
            ),
            Code.GLOBAL_SCALES,
        ),
        (kernel(op="experts", input_scales="one-for-x"), with_input_scales("per-expert"), Code.INPUT_SCALES),
        (kernel(op="experts", input_scales="one"), with_input_scales("per-expert"), Code.INPUT_SCALES),
        (kernel(op="experts", input_scales="one"), with_input_scales("one-for-x"), Code.INPUT_SCALES),
        (kernel(check=lambda _problem, _machine: [Refusal(Code.LIMIT, "M is too small")]), PROBLEM, Code.LIMIT),
        (kernel(check=lambda _problem, _machine: 1 / 0), PROBLEM, Code.CHECK_FAILED),
        (kernel(check=lambda _problem, _machine: ["no"]), PROBLEM, Code.CHECK_FAILED),
        (kernel(resident_bytes=lambda _problem: 1 / 0), PROBLEM, Code.CHECK_FAILED),
    ],
)
def test_a_kernel_that_cannot_run_says_why(spec: KernelSpec, problem: LinearProblem | ExpertsProblem, code: Code):
    answer = decide(problem, HOPPER, plugged(spec))
    assert answer.selected is None
    assert answer.candidates[0].state is State.INELIGIBLE
    assert codes(answer) == [code]


def test_all_refusals_are_collected_not_only_the_first():
    spec = kernel(devices=("cpu",), schemes={"mxfp4-w4a4": Fidelity.NATIVE}, dtypes=("float16",))
    assert codes(decide(PROBLEM, HOPPER, plugged(spec))) == [Code.DEVICE, Code.SCHEME, Code.DTYPE]


def test_what_is_not_known_refuses_nothing():
    picky = kernel(op="experts", global_scales="per-expert", input_scales="one")
    known = replace(EXPERTS, shared_global_scale=False, input_scales="per-expert")
    assert codes(decide(known, CPU, plugged(picky))) == [Code.GLOBAL_SCALES, Code.INPUT_SCALES]
    assert selected(decide(known.without_facts(), CPU, plugged(picky)))


@pytest.mark.parametrize(
    ("taken", "found"),
    [("per-expert", "per-expert"), ("per-expert", "one"), ("one-for-x", "one-for-x"), ("one-for-x", "one")],
)
def test_input_scales_with_as_few_numbers_as_a_kernel_takes_are_taken(taken: InputScales, found: InputScales):
    assert selected(decide(with_input_scales(found), CPU, plugged(kernel(op="experts", input_scales=taken))))


@pytest.mark.parametrize(
    ("scheme", "fidelity"), [(NVFP4_W4A4, Fidelity.WEIGHT_ONLY), (NVFP4_W4A16, Fidelity.NATIVE)], ids=str
)
def test_a_kernel_that_leaves_activations_alone_is_not_refused_for_their_scales(scheme: Scheme, fidelity: Fidelity):
    spec = kernel(op="experts", schemes={scheme.name: fidelity}, input_scales="one")
    problem = replace(with_input_scales("per-expert"), scheme=scheme)
    assert selected(decide(problem, CPU, plugged(spec)))


def test_padding_makes_any_size_fit_and_costs_its_bytes():
    answer = decide(PROBLEM, CPU, plugged(kernel(n_multiple=128, k_multiple=128)))
    assert answer.chosen().bytes == 128 * 64 + 128 * 8 + 4


def test_libraries_count_as_installed_only_on_a_described_machine():
    spec = kernel(requires=("vendor-lib>=2,<3",), install="pip install 'halfbyte[vendor]'")
    assert selected(decide(PROBLEM, HOPPER, plugged(spec)))
    assert codes(decide(PROBLEM, HOPPER.with_packages({}), plugged(spec))) == [Code.PACKAGE_MISSING]
    assert codes(decide(PROBLEM, HOPPER.with_packages({"vendor-lib": "3.1"}), plugged(spec))) == [Code.PACKAGE_VERSION]
    answer = decide(PROBLEM, HOPPER.with_packages({"vendor-lib": "2.5"}), plugged(spec))
    assert selected(answer)


def test_require_wins_over_priority_and_names_itself():
    answer = decide(PROBLEM, CPU, plugged(kernel("a", priority=900), kernel("b")), [Policy(require="b")])
    assert (selected(answer), answer.decided_by) == ("b", "argument require")
    assert codes(answer, "a") == [Code.NOT_REQUIRED]


def test_require_of_a_kernel_that_cannot_run_is_an_error_with_every_refusal():
    answer = decide(PROBLEM, CPU, plugged(kernel("a"), kernel("b", devices=("sm_90",))), [Policy(require="b")])
    with pytest.raises(NoKernelError) as error:
        answer.chosen()
    text = str(error.value)
    assert str(PROBLEM) in text
    assert "device" in text
    assert "not-required" in text


def test_a_rule_for_other_schemes_says_nothing_of_this_one():
    answer = decide(PROBLEM, CPU, plugged(kernel("a", priority=900), kernel("b")), [Policy(require="mxfp4-*=b")])
    assert (selected(answer), answer.decided_by) == ("a", "priority")


def test_prefer_orders_but_lets_others_run():
    policy = Policy(prefer="c,b")
    kernels = plugged(kernel("a", priority=900), kernel("b"), kernel("c", devices=("xpu",)))
    answer = decide(PROBLEM, CPU, kernels, [policy])
    assert (selected(answer), answer.decided_by) == ("b", "argument prefer")


def test_deny_decides_when_it_removes_the_winner():
    kernels = plugged(kernel("a", priority=900), kernel("b"))
    answer = decide(PROBLEM, CPU, kernels, [Policy(deny="a", origin="environment")])
    assert (selected(answer), answer.decided_by) == ("b", "environment HALFBYTE_DENY")
    assert decide(PROBLEM, CPU, kernels, [Policy(deny="b")]).decided_by == "priority"


def test_a_higher_require_lifts_a_lower_deny_but_not_the_other_way_round():
    kernels = plugged(kernel("a"), kernel("b"))
    require, deny = Policy(require="a"), Policy(deny="a", origin="environment")
    assert selected(decide(PROBLEM, CPU, kernels, [require, deny])) == "a"
    assert selected(decide(PROBLEM, CPU, kernels, [deny, require])) is None


def test_a_requirement_for_another_platform_is_none():
    spec = kernel(requires=("vendor-lib; sys_platform == 'no-such-platform'",))
    assert selected(decide(PROBLEM, HOPPER.with_packages({}), plugged(spec)))


def test_every_refusal_says_what_to_do():
    answer = decide(PROBLEM, CPU, plugged(kernel(devices=("sm_90",), dtypes=("float16",))), [Policy(deny="*")])
    assert all(refusal.hint for candidate in answer.candidates for refusal in candidate.refusals)


def test_the_highest_require_replaces_lower_ones():
    kernels = plugged(kernel("a"), kernel("b"))
    answer = decide(PROBLEM, CPU, kernels, [Policy(require="b"), Policy(require="a", origin="environment")])
    assert selected(answer) == "b"


def test_an_opt_in_kernel_runs_only_when_it_is_named():
    kernels = plugged(kernel("a", auto=False, priority=500), kernel("b"))
    answer = decide(PROBLEM, CPU, kernels)
    assert (selected(answer), codes(answer, "a")) == ("b", [Code.OPT_IN])
    assert selected(decide(PROBLEM, CPU, kernels, [Policy(prefer="a")])) == "a"
    assert selected(decide(PROBLEM, CPU, kernels, [Policy(require="a")])) == "a"


BAD = KnownBad(effect="NaN in ragged rows", thread="https://example.org/1", devices=("sm_120",), schemes=("nvfp4-*",))


def test_a_known_bad_combination_is_blocked_with_its_thread_unless_required():
    kernels = plugged(kernel("a", known_bad=(BAD,)))
    answer = decide(PROBLEM, describe("sm_120"), kernels)
    assert codes(answer, "a") == [Code.KNOWN_BAD]
    assert BAD.thread in answer.candidates[0].refusals[0].detail
    assert selected(decide(PROBLEM, describe("sm_120"), kernels, [Policy(require="a")])) == "a"
    assert codes(decide(PROBLEM, describe("sm_120"), kernels, [Policy(prefer="a")]), "a") == [Code.KNOWN_BAD]
    assert selected(decide(PROBLEM, HOPPER, kernels)) == "a"


def test_a_known_bad_version_is_blocked_only_where_it_is_installed():
    bad = KnownBad(effect="crash", thread="https://example.org/2", requires="vendor-lib<2", fixed_in="2.0")
    kernels = plugged(kernel("a", known_bad=(bad,)))
    assert codes(decide(PROBLEM, CPU.with_packages({"vendor-lib": "1.9"}), kernels), "a") == [Code.KNOWN_BAD]
    assert selected(decide(PROBLEM, CPU.with_packages({"vendor-lib": "2.0"}), kernels)) == "a"
    assert selected(decide(PROBLEM, CPU, kernels)) == "a"


def test_quantizing_activations_needs_permission_even_when_required():
    kernels = plugged(kernel("a", schemes={"nvfp4-w4a16": Fidelity.QUANTIZES_ACTIVATIONS}), kernel("b", priority=1))
    assert selected(decide(PROBLEM, CPU, kernels)) == "b"
    answer = decide(PROBLEM, CPU, kernels, [Policy(require="a")])
    assert (selected(answer), codes(answer, "a")) == (None, [Code.ACTIVATIONS])
    assert selected(decide(PROBLEM, CPU, kernels, [Policy(activations="allow-quantized")])) == "a"
    exact_above = [Policy(activations="exact"), Policy(activations="allow-quantized", origin="environment")]
    assert selected(decide(PROBLEM, CPU, kernels, exact_above)) == "b"


def test_fidelity_worse_than_allowed_is_blocked():
    kernels = plugged(kernel("a", schemes={"nvfp4-w4a16": Fidelity.EMULATED}), kernel("b", priority=1))
    answer = decide(PROBLEM, CPU, kernels, [Policy(fidelity="weight-only")])
    assert (selected(answer), codes(answer, "a")) == ("b", [Code.FIDELITY])
    assert answer.decided_by == "argument fidelity"


def test_the_form_of_the_weights_can_be_demanded():
    kernels = plugged(kernel("packed"), kernel("dense", keeps="dequantized", priority=200))
    assert selected(decide(PROBLEM, CPU, kernels)) == "dense"
    assert selected(decide(PROBLEM, CPU, kernels, [Policy(weights="packed")])) == "packed"
    answer = decide(PROBLEM, CPU, kernels, [Policy(weights="dequantized")])
    assert codes(answer, "packed") == [Code.WEIGHTS]


def test_weights_larger_than_the_memory_are_blocked():
    small = type(CPU)(name="small", arch="cpu", memory=1000)
    assert codes(decide(PROBLEM, small, plugged(kernel()))) == [Code.MEMORY]


def test_an_unknown_kernel_in_a_policy_is_an_error_with_the_nearest_match():
    with pytest.raises(UsageError, match=r"did you mean 'vendor\.fast'"):
        decide(PROBLEM, CPU, plugged(kernel("vendor.fast")), [Policy(deny="vendor.fest")])
    with pytest.raises(UsageError, match=r"halfbyte\[marlin\]"):
        decide(PROBLEM, CPU, plugged(kernel("vendor.fast")), [Policy(require="marlin.*")])


def test_proof_is_told_for_the_machine_that_is_asked_about():
    kernels = plugged(kernel(proof={"sm_90": Proof.HARDWARE, "cuda": Proof.VENDOR_CODE}))
    proofs = [decide(PROBLEM, describe(a), kernels).chosen().proof for a in ("sm_90", "sm_120", "cpu")]
    assert proofs == [Proof.HARDWARE, Proof.VENDOR_CODE, Proof.NONE]


@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    arch=st.sampled_from(ARCHES),
    priorities=st.lists(st.integers(0, 499), min_size=1, max_size=6),
    n=st.integers(1, 500),
    groups=st.integers(1, 20),
)
def test_every_candidate_has_one_state_and_a_reason_unless_it_could_run(
    scheme: str, arch: str, priorities: list[int], n: int, groups: int
):
    devices = [("any",), ("cpu",), ("sm_80..sm_90",), ("xpu",), ("sm_100..",), ("cuda",)]
    specs = [kernel(f"k{i}", priority=p, devices=devices[i]) for i, p in enumerate(priorities)]
    answer = decide(LinearProblem(scheme=SCHEMES[scheme], n=n, k=32 * groups), describe(arch), plugged(*specs))
    assert len(answer.candidates) == len(specs)
    assert sum(c.state is State.SELECTED for c in answer.candidates) == 1
    for candidate in answer.candidates:
        assert bool(candidate.refusals) == (candidate.state in (State.BLOCKED, State.INELIGIBLE))


def test_a_problem_of_another_op_has_no_candidates_of_this_one():
    assert decide(EXPERTS, CPU, plugged(kernel())).candidates == ()


def test_schemes_keep_activations_apart():
    only_a4 = plugged(kernel(schemes={"mxfp4-w4a4": Fidelity.NATIVE}))
    assert selected(decide(LinearProblem(scheme=MXFP4_W4A4, n=8, k=32), CPU, only_a4))
    assert not selected(decide(LinearProblem(scheme=MXFP4_W4A4.weight_only, n=8, k=32), CPU, only_a4))
