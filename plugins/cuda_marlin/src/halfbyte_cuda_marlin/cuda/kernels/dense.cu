// Weights back to 16 bits for cuBLAS, and what is left to do after it. Compile-time: FMT, BF16.
#include "fp4.cuh"

struct Args {
  const u16* x; const u8* w; const float* row_mult; const u16* bias; u16* y; float* part; u32* counter;
  int m, n, units;
  int tiles, first;   // tiles of 32 rows of this part of W, and the first of them
  int columns;        // tiles * 32
};

// The 4 x 4 words of four neighbouring threads, transposed: v[i] becomes v[t] of thread i.
__device__ __forceinline__ uint4 transpose4(const u32 (&v)[4], int t) {
  u32 r[4];
  auto pick = [](const u32 (&a)[4], int i) { return i & 2 ? (i & 1 ? a[3] : a[2]) : (i & 1 ? a[1] : a[0]); };
#pragma unroll
  for (int i = 0; i < 4; i++) r[i] = __shfl_xor_sync(~0u, pick(v, t ^ i), i);   // of thread t ^ i
  return make_uint4(pick(r, t), pick(r, t ^ 1), pick(r, t ^ 2), pick(r, t ^ 3));
}

// y [tiles * 32, units * 128] = the weights without the factors of their rows; a warp takes a unit at a time.
extern "C" __global__ void __launch_bounds__(256) fp4_unpack(const __grid_constant__ Args g) {
  const int lane = threadIdx.x % 32, t = lane % 4, ld = g.units * 128;
  u32 base;
  asm volatile("mov.u32 %0, 0x60006000;" : "=r"(base));
  for (int i = (blockIdx.x * 256 + threadIdx.x) / 32; i < g.tiles * g.units; i += gridDim.x * 8) {
    const int tile = i / g.units, unit = i - tile * g.units;
    const u8* p = g.w + ((u64)g.first * g.units + i) * UNIT;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint4 s = *(const uint4*)(p + 2048 + (FMT ? 0 : r * 128) + lane / 4 * 16);
      u16* y = g.y + (u64)(tile * 32 + r * 16 + lane / 4) * ld + unit * 128 + t * 8;
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const uint2 q = *(const uint2*)(p + r * 1024 + c / 2 * 512 + lane * 16 + c % 2 * 8);
        u32 a0[4], a1[4];
        decode(q.x, q.y, a0, a1);
#if FMT == 0
        const u32 sw = c == 0 ? s.x : c == 1 ? s.y : c == 2 ? s.z : s.w;
        const u32 s0 = scales(sw, 0, base), s1 = scales(sw, 1, base);
#else
        const u32 sw = r ? (c / 2 ? s.w : s.z) : (c / 2 ? s.y : s.x);
        const u32 s0 = scales(sw, c % 2, base), s1 = s0;
#endif
        const u32 top[4] = {mul2(a0[0], low2(s0)), mul2(a0[2], low2(s0)), mul2(a1[0], low2(s1)), mul2(a1[2], low2(s1))};
        const u32 low[4] = {mul2(a0[1], high2(s0)), mul2(a0[3], high2(s0)), mul2(a1[1], high2(s1)), mul2(a1[3], high2(s1))};
        *(uint4*)(y + c * 32) = transpose4(top, t);
        *(uint4*)(y + c * 32 + 8 * ld) = transpose4(low, t);
      }
    }
  }
}

// y[:, first * 32 : + columns] = w (the float sums [m, columns]) * row_mult + bias
extern "C" __global__ void __launch_bounds__(256) fp4_finish(const __grid_constant__ Args g) {
  const int quads = g.columns / 4;
  for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < (u64)g.m * quads; i += (u64)gridDim.x * 256) {
    const int m = i / quads, n = g.first * 32 + (int)(i - (u64)m * quads) * 4;
    const float4 v = ((const float4*)g.w)[i];
    const float f[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (n + j < g.n)
        g.y[(u64)m * g.n + n + j] = from_float(f[j] * g.row_mult[n + j] + (g.bias ? to_float(g.bias[n + j]) : 0.f));
  }
}
