"""`halfbyte doctor`."""

from halfbyte import doctor


def test_json_has_every_section(halfbyte):
    answer = halfbyte("doctor", "--json")
    assert answer.code == 0
    assert {
        "halfbyte",
        "python",
        "os",
        "devices",
        "torch",
        "plugins",
        "missing",
        "kernels",
        "environment",
        "faults",
    } == set(answer.data)
    assert answer.data["devices"][-1]["arch"] == "cpu"
    assert {"reference", "dequantized"} <= {kernel["kernel"] for kernel in answer.data["kernels"]}


def test_an_unknown_variable_is_listed_with_its_nearest_match_and_is_exit_code_1(halfbyte):
    answer = halfbyte("doctor", HALFBYTE_DISABLE_PLUGIN="x")
    assert answer.code == 1
    assert "HALFBYTE_DISABLE_PLUGINS" in answer.out


def test_without_torch_everything_else_is_still_told(halfbyte, monkeypatch):
    monkeypatch.setattr(doctor, "torch_build", lambda: None)
    answer = halfbyte("doctor")
    assert answer.code == 1
    assert "needs torch" in answer.out
    assert "reference" in answer.out


def test_a_kernel_says_where_it_never_ran(halfbyte):
    answer = halfbyte("doctor", "--json")
    proofs = [kernel["proof"] for kernel in answer.data["kernels"] if kernel["kernel"] == "reference"]
    assert all(proof["cpu"] == "hardware" for proof in proofs)
