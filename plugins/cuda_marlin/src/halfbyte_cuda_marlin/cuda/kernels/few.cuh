// What the kernels for few rows share: a warp's 32 rows x 128 columns of W times up to 8 * NT tokens, by mma.m16n8k16.
// Weights are the A operand (16 rows of W), tokens its n8 columns. Compile-time: FMT, BF16, NT.
#include "fp4.cuh"

#define SV (SCALE_BYTES / 128)         // 16-byte scale loads of a thread per unit

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void ldmatrix4(u32 (&r)[4], u32 addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr));
}
struct Unit { uint4 w[4]; uint4 s[SV]; };  // what one thread holds of 32 rows x 128 columns

__device__ __forceinline__ void load(Unit& v, u32 from) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; j++) v.w[j] = lds16(from + j * 512 + lane * 16);
#pragma unroll
  for (int j = 0; j < SV; j++) v.s[j] = lds16(from + 2048 + j * 128 + (lane / 4) * 16);
}

// 32 rows x 128 columns times N * 8 tokens. xn: where this lane's ldmatrix row of each 8 tokens begins.
template <int N = NT>
__device__ __forceinline__ void compute(const Unit& u, const u32 (&xn)[NT], int off, u32 base, float (&acc)[2][NT][4]) {
#pragma unroll
  for (int c = 0; c < 4; c++) {  // k32: two mma steps
    u32 b[N][4];
#pragma unroll
    for (int n = 0; n < N; n++) ldmatrix4(b[n], xn[n] + off + c * 64);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint4& q = u.w[r * 2 + c / 2];
      u32 a0[4], a1[4];
      fragments(c % 2 ? q.z : q.x, c % 2 ? q.w : q.y, u.s[FMT ? 0 : r], c, r, base, a0, a1);
#pragma unroll
      for (int n = 0; n < N; n++) mma(acc[r][n], a0, b[n][0], b[n][1]);
#pragma unroll
      for (int n = 0; n < N; n++) mma(acc[r][n], a1, b[n][2], b[n][3]);
    }
  }
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 lds_floats(u32 a) {
  const uint4 v = lds16(a);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
// Four rows of the result of token m, from n on: the sums times `mult`, plus `add`.
template <class Args>
__device__ __forceinline__ void store4(const Args& g, float4 v, float4 mult, float4 add, int m, int n) {
  const u16 h[4] = {from_float(v.x * mult.x + add.x), from_float(v.y * mult.y + add.y), from_float(v.z * mult.z + add.z),
                    from_float(v.w * mult.w + add.w)};
  u16* y = g.y + (u64)m * g.n + n;
  if (g.n % 4 == 0) {
    if (n < g.n) *(uint2*)y = make_uint2(h[0] | (u32)h[1] << 16, h[2] | (u32)h[3] << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (n + i < g.n) y[i] = h[i];
  }
}
