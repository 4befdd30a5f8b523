"""`halfbyte bench`: what it measures is shown, what it does not run is not lost."""

import pytest

SMALL = ("bench", "--op", "linear", "--scheme", "mxfp4-w4a16", "--shape", "64x64", "--m", "1,3", "--device", "cpu")


def test_every_kernel_is_compared_then_timed_beside_torch(halfbyte):
    answer = halfbyte(*SMALL, "--json")
    assert answer.code == 0
    measured = [row for row in answer.data["rows"] if row["m"] is not None]
    kernels = [(row["m"], row["kernel"]) for row in measured]
    assert kernels[:3] == [(1, "torch (dense)"), (1, "dequantized"), (1, "reference")]
    assert all(row["ok"] and row["error"] <= row["tolerance"] and row["median_us"] > 0 for row in measured)


def test_what_may_not_run_is_listed_with_its_refusal(halfbyte):
    answer = halfbyte(*SMALL, "--deny", "reference")
    assert answer.code == 0
    assert "denied" in answer.out


def test_nothing_to_run_is_exit_code_1(halfbyte):
    assert halfbyte(*SMALL, "--deny", "*").code == 1


def test_a_problem_that_cannot_fit_is_refused_before_anything_is_made(halfbyte):
    sizes = ("--scheme", "nvfp4-w4a16", "--device", "cpu")
    for more in (("--shape", "1000000x1000000", "--m", "1"), ("--shape", "64x64", "--m", "1000000000000")):
        answer = halfbyte("bench", "--op", "linear", *sizes, *more)
        assert answer.code == 1
        assert "takes at least" in answer.err


@pytest.mark.parametrize("rows", ["0", "one", ""])
def test_numbers_of_rows_that_make_no_sense_are_exit_code_2(halfbyte, rows: str):
    assert halfbyte(*SMALL, "--m", rows).code == 2


def test_experts_are_measured_too(halfbyte):
    sizes = ("--experts", "4", "--top-k", "2", "--hidden", "64", "--intermediate", "32", "--m", "2", "--device", "cpu")
    answer = halfbyte("bench", "--op", "experts", "--scheme", "nvfp4-w4a16", *sizes, "--json")
    assert answer.code == 0
    measured = {row["kernel"] for row in answer.data["rows"] if row["m"] is not None}
    assert measured == {"torch (dense)", "dequantized", "reference"}
