// W4A16 linear for many rows of x, SM90: wgmma with the decoded weights as A from registers, x as B in shared memory.
// Compile-time: FMT, BF16, NTOK (tokens per tile), WGS (warpgroups of 64 rows), STAGES (of 128 columns).
#include "fp4.cuh"
#include "barriers.cuh"
#include "wgmma.cuh"   // nvrtc.py writes it: wgmma names every register

#define THREADS (WGS * 128)           // that compute; one more warpgroup fetches
// Registers of a computing and of a fetching thread: together what the launch gave.
#define REGS (WGS == 4 ? 112 : WGS == 3 ? 152 : 240)
#define FETCH_REGS (WGS == 4 ? 32 : WGS == 3 ? 56 : 24)
#define ROWS (WGS * 64)

struct Args {
  const u16* x; const u8* w; const float* row_mult; const u16* bias; u16* y;
  float* part; u32* counter;
  int m, n, k, units, tiles;   // tiles of 32 rows
  int blocks, ttiles;          // of ROWS rows, of NTOK tokens
};

#define XTILE (NTOK * 256)       // 128 columns of x: two swizzled halves of 64
#define STAGE ((XTILE + WGS * 2 * UNIT + 1023) / 1024 * 1024)

struct __align__(64) TensorMap { u64 v[16]; };

// All (item, unit) pairs, K fastest, are dealt out evenly in flat ranges; an item is ROWS rows x NTOK tokens.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    fp4_wide(const __grid_constant__ Args g, const __grid_constant__ TensorMap xmap) {
  extern __shared__ __align__(1024) u8 smem[];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int total = g.blocks * g.ttiles * g.units, ctas = gridDim.x;
  const int share = total / ctas, more = total - share * ctas;
  auto begin = [&](int c) { return c * share + min(c, more); };
  const int f0 = begin(blockIdx.x), f1 = begin(blockIdx.x + 1);
  asm volatile("griddepcontrol.launch_dependents;");
  const u32 data = (smem_addr(smem) + 1023) & ~1023u;
  const u32 full = data + STAGES * STAGE, empty = full + STAGES * 8;
  const int r = warp % 2;

  if (tid == 0) {
    for (int i = 0; i < STAGES; i++) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(full + i * 8));
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(empty + i * 8), "r"(WGS * 4));
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();

  if (__shfl_sync(~0u, tid / 128, 0) == WGS) {   // its first warp fetches: lane i brings tile i of the weights, the last two lanes bring x
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FETCH_REGS));
    if (warp != WGS * 4) return;
    int i = f0 / g.units, u = f0 - i * g.units, st = 0, phase = 1;
    if (lane >= 30) asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int f = f0; f < f1; f++) {
      const u32 d = data + st * STAGE, bar = full + st * 8;
      const int tile = i / g.ttiles * (ROWS / 32), tiles = min(g.tiles - tile, ROWS / 32);
      wait_barrier(empty + st * 8, phase);
      if (lane == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(XTILE + tiles * UNIT));
      __syncwarp();
      if (lane < tiles)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         d + XTILE + lane * UNIT), "l"(g.w + ((u64)(tile + lane) * g.units + u) * UNIT), "r"(UNIT), "r"(bar)
                     : "memory");
      if (lane >= 30)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                     ::"r"(d + (lane - 30) * NTOK * 128), "l"(&xmap), "r"(u * 128 + (lane - 30) * 64),
                     "r"(i % g.ttiles * NTOK), "r"(bar) : "memory");
      if (++u == g.units) { u = 0; i++; }
      if (++st == STAGES) { st = 0; phase ^= 1; }
    }
  } else {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGS));
  asm volatile("griddepcontrol.wait;" ::: "memory");   // bias, partial sums and y are touched below

  auto release = [&](int stage) {
    if (lane == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(empty + stage * 8) : "memory");
  };
  u32 base;
  asm volatile("mov.u32 %0, 0x60006000;" : "=r"(base));
  float acc[NTOK / 2];
  int st = 0, phase = 0;
  __shared__ u32 last;
  for (int f = f0; f < f1;) {
    const int end = min(f1, (f / g.units + 1) * g.units);
    int before = -1;
    // A loop of its own, or the compiler waits for the sums at its end.
    for (; f < end; f++) {
      wait_barrier(full + st * 8, phase);
      const u32 xa = data + st * STAGE, wa = xa + XTILE + warp / 2 * UNIT;
      const uint4 q0 = lds16(wa + r * 1024 + lane * 16), q1 = lds16(wa + r * 1024 + 512 + lane * 16);
      const uint4 sc = lds16(wa + 2048 + (FMT ? 0 : r * 128) + lane / 4 * 16);
      const u64 desc0 = (u64)((xa & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
      u32 a[2][2][4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const uint4& q = c / 2 ? q1 : q0;
        u32(&a0)[4] = a[c % 2][0];
        u32(&a1)[4] = a[c % 2][1];
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (c == 1 && before >= 0) release(before);   // all that read the previous stage is done
        fragments(c % 2 ? q.z : q.x, c % 2 ? q.w : q.y, sc, c, r, base, a0, a1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        const u64 desc = desc0 + (c / 2) * (NTOK * 128 / 16) + (c % 2) * 4;
        wgmma(acc, a0, desc, before >= 0 || c > 0);
        wgmma(acc, a1, desc + 2, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      }
      before = st;
      if (++st == STAGES) { st = 0; phase ^= 1; }
    }

    // The item (ROWS rows x NTOK tokens), or this CTA's part of it, is done.
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    release(before);
    const int item = (f - 1) / g.units, blk = item / g.ttiles, i0 = item * g.units, i1 = i0 + g.units;
    bool write = true;
    if (f0 > i0 || f1 < i1) {   // cut: the last CTA to arrive adds up the parts in the order of K
      float4* slot = (float4*)g.part + (u64)(2 * blockIdx.x + (f0 <= i0)) * (ROWS * NTOK / 4) + tid;
#pragma unroll
      for (int j = 0; j < NTOK / 8; j++)
        __stcg(slot + j * THREADS, make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]));
      auto owner = [&](int v) {
        const int cut = more * (share + 1);
        return v < cut ? v / (share + 1) : more + (v - cut) / share;
      };
      const int c0 = owner(i0), c1 = owner(i1 - 1);
      asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
      if (tid == 0) {
        __threadfence();
        last = atomicInc(g.counter + item, c1 - c0) == c1 - c0;
        __threadfence();
      }
      asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
      write = last;
      if (write) {
#pragma unroll
        for (int j = 0; j < NTOK / 2; j++) acc[j] = 0.f;
        for (int c = c0; c <= c1; c++) {
          const float4* p = (const float4*)g.part + (u64)(2 * c + (begin(c) <= i0)) * (ROWS * NTOK / 4) + tid;
#pragma unroll
          for (int j = 0; j < NTOK / 8; j++) {
            const float4 v = __ldcg(p + j * THREADS);
            acc[4 * j] += v.x; acc[4 * j + 1] += v.y; acc[4 * j + 2] += v.z; acc[4 * j + 3] += v.w;
          }
        }
      }
    }
    if (write) {
      const int n = blk * ROWS + warp * 16, t0 = (item % g.ttiles) * NTOK;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = n + h * 8 + lane / 4, col = n + h * 8 + lane % 4 * 2;
        const bool in = row < g.n;
        const float mult = in ? g.row_mult[row] : 0.f, add = in && g.bias ? to_float(g.bias[row]) : 0.f;
#pragma unroll
        for (int j = 0; j < NTOK / 8; j++) {   // 8 rows x 8 tokens, turned so that a thread has two rows of one token
          const u32 v = from_float(acc[4 * j + 2 * h] * mult + add) | (u32)from_float(acc[4 * j + 2 * h + 1] * mult + add) << 16;
          u32 y2;
          asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y2) : "r"(v));
          const int t = t0 + j * 8 + lane / 4;
          u16* y = g.y + (u64)t * g.n + col;
          if (t < g.m) {
            if (g.n % 2 == 0) {
              if (col < g.n) *(u32*)y = y2;
            } else {
              if (col < g.n) y[0] = (u16)y2;
              if (col + 1 < g.n) y[1] = (u16)(y2 >> 16);
            }
          }
        }
      }
    }
  }
  }
}
