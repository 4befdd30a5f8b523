"""Our two custom operators over the double: bits, shapes, refusals, fakes, and what compiles them."""

import json
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from halfbyte import numerics
from halfbyte.conformance import data
from halfbyte.errors import PluginError
from halfbyte.formats import MXFP4
from halfbyte.kernels import Packed, load_kernel
from halfbyte.ops import register
from halfbyte.schemes import MXFP4_W4A4, SCHEMES
from halfbyte.specs import KernelSpec
from halfbyte_xpu.plugin import halfbyte_kernels
from halfbyte_xpu.testing import vllm_experts, vllm_linear
from halfbyte_xpu.testing.vllm import HOMES
from halfbyte_xpu.vllm_kernels import library, ops, schemas
from halfbyte_xpu.vllm_kernels.linear import Fp4Gemm
from xpu import refused
from xpu.malformed import CALLS

pytestmark = pytest.mark.usefixtures("doubles")

DTYPES = [torch.bfloat16, torch.float16]
#: E8M0 code of 2**-33, the least scale.
FLOOR = 94


def every_amax(dtype: torch.dtype) -> torch.Tensor:
    """Every positive finite number of a 16-bit dtype, each the largest of a group of 32 [numbers, 32]."""
    numbers = torch.arange(1, 0x7FFF, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    shares = torch.linspace(-1, 1, 32, dtype=torch.float64)
    return (numbers.double()[:, None] * shares).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_double_quantizes_every_amax_bit_for_bit_by_the_documented_rule(dtype: torch.dtype):
    x = every_amax(dtype)
    packed, scales = ops.quantize_mxfp4(x)
    _, rule = numerics.quantize(x, MXFP4, scale_rule="ceil", ties="toward-zero")
    expected = rule.clamp(min=FLOOR)
    assert torch.equal(scales, expected)
    ratio = x.double() / torch.exp2(expected.double() - 127)
    codes = numerics.pack(numerics.encode(ratio.float(), "toward-zero"))
    # The sign of a zero is the one thing that the two may have otherwise.
    assert torch.equal(numerics.decode_packed(packed), numerics.decode_packed(codes))


def test_ties_go_toward_zero_and_the_low_nibble_is_the_even_column():
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, :10] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, -0.1])
    packed, scales = ops.quantize_mxfp4(x)
    assert scales.tolist() == [[127]]
    nibbles = [code for byte in packed[0].tolist() for code in (byte & 15, byte >> 4)]
    assert nibbles[:10] == [7, 0, 1, 2, 3, 4, 5, 6, 9, 8]
    assert not any(nibbles[10:])


def test_a_group_of_zeros_has_the_least_scale():
    packed, scales = ops.quantize_mxfp4(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert not packed.any()
    assert scales.eq(FLOOR).all()


@pytest.mark.parametrize("shape", [(64,), (3, 32), (2, 3, 64), (2, 1, 3, 96), (0, 64), (2, 0, 32)])
def test_all_leading_dimensions_are_batch(shape: tuple[int, ...]):
    x = torch.randn(shape, dtype=torch.bfloat16)
    packed, scales = ops.quantize_mxfp4(x)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert scales.shape == (*shape[:-1], shape[-1] // 32)
    flat = ops.quantize_mxfp4(x.reshape(-1, shape[-1]))
    assert torch.equal(packed.flatten(), flat[0].flatten())
    assert torch.equal(scales.flatten(), flat[1].flatten())


def test_strides_make_no_difference():
    x = torch.randn(64, 6, dtype=torch.bfloat16)
    packed, scales = ops.quantize_mxfp4(x.t())
    expected = ops.quantize_mxfp4(x.t().contiguous())
    assert torch.equal(packed, expected[0])
    assert torch.equal(scales, expected[1])
    assert packed.is_contiguous()


@pytest.mark.parametrize("wrong", CALLS)
def test_malformed_calls_are_refused_before_the_vendor_sees_them(wrong: str, monkeypatch):
    def never(*_):
        raise AssertionError("the vendor was called")

    for op, (home, name) in HOMES.items():
        if op in schemas.LINEAR_OPS:
            monkeypatch.setattr(home, name, never)
    with pytest.raises(ValueError, match=r"[0-9]|another|float") as real:
        CALLS[wrong]()
    assert any(word in str(real.value) for word in ("expected", "pad it", "convert it", "ask for", "has groups"))


def test_fakes_refuse_in_the_same_words():
    for shape, dtype, group in (((2, 48), torch.bfloat16, 32), ((4, 64), torch.int32, 32), ((4, 64), torch.half, 16)):
        with pytest.raises(ValueError, match="cannot quantize") as real:
            ops.quantize_mxfp4(torch.zeros(shape, dtype=dtype), group)
        with FakeTensorMode(), pytest.raises(ValueError, match="cannot quantize") as fake:
            ops.quantize_mxfp4(torch.empty(shape, dtype=dtype, device="xpu"), group)
        assert str(fake.value) == str(real.value)


@pytest.mark.parametrize(("text", "call"), refused.CALLS, ids=[text for text, _ in refused.CALLS])
def test_the_double_refuses_what_the_vendor_refuses_in_its_order_and_words(text: str, call):
    op, arguments = call
    with pytest.raises(RuntimeError) as error:
        getattr(getattr(torch.ops, op.library), op.name)(*arguments)
    assert str(error.value).startswith(text)


def gemm_arguments(device: str = "cpu", n: int = 16, k: int = 64, lead: tuple[int, ...] = (4,)):
    def codes(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0x21, dtype=torch.uint8, device=device)

    scales = (torch.full(shape, 127, dtype=torch.uint8, device=device) for shape in ((*lead, k // 32), (k // 32, n)))
    x_scales, weight_scales = scales
    return codes(*lead, k // 2), x_scales, codes(n, k // 2), weight_scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 2)])
def test_fakes_on_an_xpu_have_shape_dtype_and_device(lead: tuple[int, ...], dtype: torch.dtype):
    with FakeTensorMode():
        x = torch.empty(*lead, 64, dtype=dtype, device="xpu")
        packed, scales = ops.quantize_mxfp4(x)
        arguments = gemm_arguments("xpu")
        y = ops.fp4_gemm(packed, scales, arguments[2], arguments[3], None, dtype)
    assert (packed.shape, packed.dtype) == ((*lead, 32), torch.uint8)
    assert (scales.shape, scales.dtype) == ((*lead, 2), torch.uint8)
    assert (y.shape, y.dtype, y.device.type) == ((*lead, 16), dtype, "xpu")


def on_xpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="xpu")


DECLARED = [
    pytest.param(spec, getattr(torch, name), id=f"{spec.id}-{spec.op}-{name}")
    for spec in halfbyte_kernels()
    for name in spec.dtypes
]


@pytest.mark.parametrize(("spec", "dtype"), DECLARED)
def test_every_kernel_traces_on_an_xpu_that_is_not_there(spec: KernelSpec, dtype: torch.dtype):
    kernel = load_kernel(spec)
    for scheme in (SCHEMES[name] for name in spec.schemes):
        weights: Any
        routing: tuple[torch.Tensor, ...] = ()
        if spec.op == "linear":
            weights = data.linear_weights(scheme, 16, 64, dtype=dtype)
            problem = weights.problem(dtype)
        else:
            weights = data.experts_weights(scheme, 4, 64, 32, dtype=dtype)
            problem, routing = weights.problem(dtype, top_k=2, activation="silu"), data.routing(5, 4, 2)
        prepared = kernel.prepare(weights, problem)
        key = register(spec, kernel, Packed(problem, prepared))
        with FakeTensorMode():
            packed, rest = [on_xpu(tensor) for tensor in prepared.values()], [on_xpu(tensor) for tensor in routing]
            x = torch.empty(5, 64, dtype=dtype, device="xpu")
            y = getattr(torch.ops.halfbyte, spec.op)(x, packed, *rest, None, key)
        expected = (5, 16 if spec.op == "linear" else 64)
        assert (y.shape, y.dtype, y.device.type) == (expected, dtype, "xpu")


def test_what_is_inside_fp4_gemm_traces_too():
    weights = data.linear_weights(MXFP4_W4A4, 16, 64, dtype=torch.bfloat16)
    kernel, problem = Fp4Gemm(), weights.problem(torch.bfloat16)
    prepared = kernel.prepare(weights, problem)
    with FakeTensorMode():
        packed = Packed(problem, {name: on_xpu(tensor) for name, tensor in prepared.items()})
        y = kernel.apply(torch.empty(5, 64, dtype=torch.bfloat16, device="xpu"), packed, None)
    assert (y.shape, y.dtype, y.device.type) == ((5, 16), torch.bfloat16, "xpu")


@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 64), (0, 64)])
def test_the_quantizer_passes_opcheck(shape: tuple[int, ...]):
    torch.library.opcheck(ops.quantize_mxfp4, (torch.randn(shape, dtype=torch.bfloat16),))


@pytest.mark.parametrize("biased", [False, True])
def test_the_product_passes_opcheck(biased: bool):
    bias = torch.ones(16, dtype=torch.bfloat16) if biased else None
    torch.library.opcheck(ops.fp4_gemm, (*gemm_arguments(), bias, torch.bfloat16))


def layer(x: torch.Tensor) -> torch.Tensor:
    _, _, weight, scales = gemm_arguments()
    packed, x_scales = ops.quantize_mxfp4(x * 2)
    return ops.fp4_gemm(packed, x_scales, weight, scales, None, x.dtype) + 1


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)])
def test_the_product_takes_all_leading_dimensions(lead: tuple[int, ...]):
    x, x_scales, weight, scales = gemm_arguments(lead=lead)
    y = ops.fp4_gemm(x, x_scales, weight, scales, None, torch.bfloat16)
    # Every code is 0.5 or 1, every scale 1: 32 * (0.5 ** 2 + 1).
    assert torch.equal(y, torch.full((*lead, 16), 40.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_a_layer_of_both_compiles_whole_and_gives_the_same_bits(backend: str):
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for shape in ((4, 64), (2, 3, 64)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), layer(x))


#: Read out of the bytes of the wheel that it names; tools/xpu_vendor_checks.py reads them again.
WHEEL = json.loads((Path(__file__).parent / "wheel_schemas.json").read_text(encoding="utf-8"))


def test_every_operator_that_we_call_is_pinned():
    assert set(WHEEL["schemas"]) == {str(op) for op in (*schemas.LINEAR_OPS, *schemas.EXPERTS_OPS)}


@pytest.mark.parametrize("op", [*schemas.LINEAR_OPS, *schemas.EXPERTS_OPS], ids=str)
def test_schemas_are_the_ones_read_out_of_the_wheel(op: schemas.Op):
    text = WHEEL["schemas"][str(op)]
    assert op.schema == text
    registered = getattr(getattr(torch.ops, op.library), op.name).default._schema
    assert registered == torch._C.parse_schema(f"{op.library}::{text}")


def test_an_installed_wheel_of_the_pinned_version_has_those_bytes_and_schemas():
    version = WHEEL["wheel"].split("-")[1]
    try:
        wheel = distribution(schemas.DISTRIBUTION)
    except PackageNotFoundError:
        pytest.skip(f"vllm-xpu-kernels {version} is not installed")
    if wheel.version != version:
        pytest.skip(f"vllm-xpu-kernels is {wheel.version}, not {version}")
    files = {name: Path(str(wheel.locate_file(f"{schemas.PACKAGE}/{name}"))) for name in WHEEL["sha256"]}
    assert {name: sha256(file.read_bytes()).hexdigest() for name, file in files.items()} == WHEEL["sha256"]
    for op in (*schemas.LINEAR_OPS, *schemas.EXPERTS_OPS):
        assert schemas.read_schema(files[f"{op.library}.abi3.so"], op.name) == WHEEL["schemas"][str(op)]


def test_another_schema_is_an_error_when_the_library_is_loaded(monkeypatch):
    wrong = schemas.Op("_xpu_C", "fp4_gemm(Tensor A, Tensor B) -> Tensor")
    with pytest.raises(PluginError, match="fp4_gemm"):
        library.load((wrong,))


def test_what_the_grouped_product_does_not_compute_is_no_number():
    a = torch.ones(5, 32, dtype=torch.bfloat16)
    b = torch.zeros(2, 8, 16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    scales, d = torch.full((2, 8, 1), 127, dtype=torch.uint8), torch.empty(5, 8, dtype=torch.bfloat16)
    rows = torch.tensor([1, 2], dtype=torch.int32)
    vllm_experts.grouped_gemm(a, None, b, scales, None, d, rows, 8, 32, 2)
    assert d.isnan().any(1).tolist() == [False] * 3 + [True] * 2


def test_the_result_is_float16_where_no_dtype_is_asked_for():
    x, x_scales, weight, scales = gemm_arguments()
    f4, e8 = torch.float4_e2m1fn_x2, torch.float8_e8m0fnu
    y = vllm_linear.fp4_gemm(x.view(f4), weight.view(f4).t(), x_scales.view(e8), scales.view(e8), None, None)
    assert y.dtype == torch.float16
