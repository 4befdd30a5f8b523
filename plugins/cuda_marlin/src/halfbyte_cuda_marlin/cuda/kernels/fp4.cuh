// What all matrix kernels share: the unit of packed weights, and how it becomes fragments.
//
// A unit is 32 rows x 128 columns of W: 2048 bytes of codes in the order in which a warp's threads hold the A fragments of
// mma.m16n8k16 (16 bytes for each thread and 16 x 64), then its block scales. packing.py defines the order.
// Compile-time: FMT (0 NVFP4, 1 MXFP4), BF16 (1 bf16, 0 fp16).
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

#define SCALE_BYTES (FMT ? 128 : 256)
#define UNIT (2048 + SCALE_BYTES)

__device__ __forceinline__ u32 rotl(u32 v, int s) { return __funnelshift_l(v, v, s); }
__device__ __forceinline__ u32 select(u32 a, u32 b, u32 mask) {   // bit by bit: a where the mask is 1, else b
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}
// 16 codes (the A fragments of two k16 steps) from two words, by masks and shifts alone. The value of a code is
// e2m1 * 2^-126 in bf16 (sign in bit 15, exponent and mantissa in bits 8..6), e2m1 * 2^-14 in fp16 (bits 15, 11..9).
__device__ __forceinline__ void decode(u32 w0, u32 w1, u32 (&a)[4], u32 (&b)[4]) {
#if BF16
  const u32 M = 0x81C081C0u;  // three pairs lie whole in each word; the rests of both words make two more
  u32 v = select(w0, w1 << 2, 0x06030603u);
  a[0] = w0 & M; a[1] = (w0 << 4) & M; a[2] = rotl(w0, 10) & M; a[3] = (v << 6) & M;
  b[0] = w1 & M; b[1] = (w1 << 4) & M; b[2] = rotl(w1, 10) & M; b[3] = rotl(v, 12) & M;
#else
  const u32 M = 0x8E008E00u, E = 0x0E000E00u;
  a[0] = w0 & M; a[1] = (w0 << 3) & M; a[2] = select(w0 << 6, w0 << 1, E) & M; a[3] = select(w0 << 9, w0 << 2, E) & M;
  b[0] = w1 & M; b[1] = (w1 << 3) & M; b[2] = select(w1 << 6, w1 << 1, E) & M; b[3] = select(w1 << 9, w1 << 2, E) & M;
#endif
}
// Two scales (rows g and g+8) as 16-bit floats from the even or the odd bytes of a word. `base` is 0x60006000, kept in
// a register so that mask and base are one LOP3.
__device__ __forceinline__ u32 scales(u32 w, int odd, u32 base) {
#if BF16 && FMT == 0
  u32 d;                                                          // E5M3
  asm("lop3.b32 %0, %1, 0x0FF00FF0, %2, 0xEA;" : "=r"(d) : "r"(odd ? w >> 4 : w << 4), "r"(base));
  return d;
#else
  return (odd ? w >> 1 : w << 7) & 0x7F807F80u;                   // fp16: E5M3; bf16: E8M0
#endif
}
__device__ __forceinline__ u32 low2(u32 s) {
  u32 d;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(d) : "r"(s));
  return d;
}
__device__ __forceinline__ u32 high2(u32 s) {
  u32 d;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(d) : "r"(s));
  return d;
}
__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 d;
#if BF16
#if __CUDA_ARCH__ >= 900
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
#endif
#else
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}
// The A fragments of 32 columns of K, scaled: codes from half of a thread's 16 bytes, scales of the columns from 32 * c of
// the unit on; r: which 16 rows of it.
__device__ __forceinline__ void fragments(u32 w0, u32 w1, const uint4& sc, int c, int r, u32 base, u32 (&a0)[4],
                                          u32 (&a1)[4]) {
  decode(w0, w1, a0, a1);
#if FMT == 0
  const u32 sw = c == 0 ? sc.x : c == 1 ? sc.y : c == 2 ? sc.z : sc.w;
  const u32 s0 = scales(sw, 0, base), s1 = scales(sw, 1, base);
#else
  const u32 sw = r ? (c / 2 ? sc.w : sc.z) : (c / 2 ? sc.y : sc.x);
  const u32 s0 = scales(sw, c % 2, base), s1 = s0;
#endif
  const u32 s0l = low2(s0), s0h = high2(s0), s1l = low2(s1), s1h = high2(s1);
  a0[0] = mul2(a0[0], s0l); a0[1] = mul2(a0[1], s0h); a0[2] = mul2(a0[2], s0l); a0[3] = mul2(a0[3], s0h);
  a1[0] = mul2(a1[0], s1l); a1[1] = mul2(a1[1], s1h); a1[2] = mul2(a1[2], s1l); a1[3] = mul2(a1[3], s1h);
}
__device__ __forceinline__ float to_float(u16 v) {
#if BF16
  return __uint_as_float((u32)v << 16);
#else
  float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f;
#endif
}
__device__ __forceinline__ u16 from_float(float f) {
  u16 v;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}
__device__ __forceinline__ u32 smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cp_async(u32 dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes));
}
__device__ __forceinline__ uint4 lds16(u32 a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
