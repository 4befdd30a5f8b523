"""The exact arithmetic of FP4: plain torch, any device, safe under torch.compile; kernels are held against it."""

from halfbyte.numerics.e2m1 import TIES, decode, decode_packed, encode, pack, unpack
from halfbyte.numerics.global_scales import GlobalScale, GlobalScaleLike, global_scale_for, scale_table
from halfbyte.numerics.quantize import dequantize, fake_quantize, quantize
from halfbyte.numerics.scales import SCALE_RULES, decode_e8m0, encode_e4m3, mxfp4_scale, nvfp4_scale, scale_codes

__all__ = [
    "SCALE_RULES",
    "TIES",
    "GlobalScale",
    "GlobalScaleLike",
    "decode",
    "decode_e8m0",
    "decode_packed",
    "dequantize",
    "encode",
    "encode_e4m3",
    "fake_quantize",
    "global_scale_for",
    "mxfp4_scale",
    "nvfp4_scale",
    "pack",
    "quantize",
    "scale_codes",
    "scale_table",
    "unpack",
]
