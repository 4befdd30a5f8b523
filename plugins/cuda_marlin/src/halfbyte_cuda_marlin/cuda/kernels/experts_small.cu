// W4A16 matrix products of experts for few rows each: bound by the weights of the experts that are hit.
// A block is up to 8 * NT rows of x that go to one expert; an item is 32 rows of W (a tile) for one block, in all of K or in
// one of several splits of it. Each CTA takes a contiguous range of items, each team of `wk` warps every n-th of those.
// Compile-time: FMT, BF16, ACT (0: y is float32 [splits, slots, n]; else y is 16-bit [slots, n] behind the activation
// function), NT (n-tiles of 8 rows), WARPS (that compute; one more fetches x), STAGES (units in flight per warp),
// GATHER (1: x has the tokens' rows, 0: the sorted ones).
#include "few.cuh"
#include "barriers.cuh"
#include "experts.cuh"

#define GATED (ACT >= 1 && ACT <= 3)
#define THREADS (WARPS * 32)

struct Args {
  const u16* x; const u8* w; const float* row_mult; const u16* bias; void* y;
  const int* count; const Block* blocks; const int* source;   // or null: each slot is a block, at most 32 of them
  const int* ids; const int* map;                             // then these tell which are here
  int k, units, tiles, n, slots, top_k;   // of x; padded K / 128; of 32 rows; of y
  int numbers, experts;                   // an id is one of so many; here are so many
  int splits, chunk;                      // of K; units of one split
  int wk, buffers, block, xstride, list;  // x buffers; rows of a block, at most; bytes of one in shared memory; blocks of a CTA, at most
};

// The results of a tile: `acc` times the rows' multipliers, plus bias, through the activation function.
__device__ __forceinline__ void store(const Args& g, const Block& b, int split, int tile, int lane,
                                      const float (&mult)[4], const float (&add)[4], const float (&acc)[2][NT][4]) {
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int m = n * 8 + lane % 4 * 2 + j;
        if (m >= b.rows) continue;
        const float v0 = acc[r][n][j] * mult[2 * r] + add[2 * r], v1 = acc[r][n][2 + j] * mult[2 * r + 1] + add[2 * r + 1];
#if GATED
        ((u16*)g.y)[(u64)(b.first + m) * g.n + tile * 16 + r * 8 + lane / 4] = from_float(activate(v0, v1));
#else
        const u64 at = ((u64)split * g.slots + b.first + m) * g.n + tile * 32 + r * 16 + lane / 4;
#if ACT
        ((u16*)g.y)[at] = from_float(activate(0.f, v0));
        ((u16*)g.y)[at + 8] = from_float(activate(0.f, v1));
#else
        ((float*)g.y)[at] = v0;
        ((float*)g.y)[at + 8] = v1;
#endif
#endif
      }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) fp4_experts_small(const __grid_constant__ Args g) {
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  // Shared memory: rings, barriers (rings, x full, x empty), list of blocks, x buffers, sums of teams.
  const u32 bars = smem_addr(smem) + WARPS * STAGES * UNIT, full = bars + WARPS * STAGES * 8, empty = full + 16;
  Block* const list = (Block*)(smem + WARPS * STAGES * (UNIT + 8) + 32);
  const u32 xs = smem_addr(list + g.list);
  const int xbytes = g.block * g.xstride;
  u8* const red = (u8*)(list + g.list) + g.buffers * xbytes;

  if (tid == 0) {
    for (int i = 0; i < WARPS * STAGES; i++) init_barrier(bars + i * 8, 1);
    for (int i = 0; i < 2; i++) {
      init_barrier(full + i * 8, 1);
      init_barrier(empty + i * 8, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
#if GATHER
  asm volatile("griddepcontrol.wait;" ::: "memory");   // else the routing is older than the kernel in front
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const int own = !g.count && lane < g.slots ? local_expert(g.ids[lane], g.map, g.numbers, g.experts) : -1;
  const u32 here = __ballot_sync(~0u, own >= 0);
  const int per = g.splits * g.tiles, total = (g.count ? *g.count : __popc(here)) * per;
  const int t0 = (u64)total * blockIdx.x / gridDim.x, t1 = (u64)total * (blockIdx.x + 1) / gridDim.x;
  const int b0 = t0 / per, blocks = t1 > t0 ? (t1 - 1) / per + 1 - b0 : 0;
  if (g.count) {
    for (int i = tid; i < blocks; i += THREADS + 32) list[i] = g.blocks[b0 + i];
  } else if (own >= 0) {   // every warp writes the same
    const int i = __popc(here & ((1u << lane) - 1)) - b0;
    if (i >= 0 && i < blocks) list[i] = {own, lane, 1, 0};
  }
  __syncthreads();
  // Strips: the tiles of one block and split, which share x.
  const int s0 = t0 / g.tiles, strips = t1 > t0 ? (t1 - 1) / g.tiles + 1 - s0 : 0;

  if (warp == WARPS) {   // lane r brings row r of each strip's x
#if !GATHER
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    for (int i = 0; i < strips; i++) {
      const int s = s0 + i, split = s % g.splits, slot = i % g.buffers, u0 = split * g.chunk;
      const Block b = list[s / g.splits - b0];
      const int columns = min(g.k - u0 * 128, g.chunk * 128), tail = min(g.units - u0, g.chunk) * 128 - columns;
      int row = b.first + lane;
#if GATHER
      if (lane < b.rows) row = (g.source ? g.source[row] : row) / g.top_k;
#endif
      if (i >= g.buffers) wait_barrier(empty + slot * 8, (i / g.buffers - 1) & 1);
      const u32 to = xs + slot * xbytes + lane * g.xstride;
      if (lane < b.rows)   // columns beyond K meet codes that are zero, and must be finite
        for (int c = 0; c < tail; c += 8)
          asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to + (columns + c) * 2), "r"(0) : "memory");
      __syncwarp();
      if (lane == 0) expect(full + slot * 8, b.rows * columns * 2);
      __syncwarp();
      if (lane < b.rows) bulk_copy(to, g.x + (u64)row * g.k + u0 * 128, columns * 2, full + slot * 8);
    }
    return;
  }

  const int team = warp / g.wk, part = warp - team * g.wk, teams = WARPS / g.wk;
  const u32 ring = smem_addr(smem) + warp * (STAGES * UNIT), mine = bars + warp * (STAGES * 8);
  // The unit that is fetched next: of item ft, in that item's split.
  int ft = t0 + team, fu = part, flen = 0;
  const u8* fp = nullptr;
  auto aim = [&]() {
    if (ft >= t1) return;
    const int s = ft / g.tiles, split = s % g.splits;
    fp = g.w + (((u64)list[s / g.splits - b0].expert * g.tiles + (ft - s * g.tiles)) * g.units + split * g.chunk) * UNIT;
    flen = min(g.chunk, g.units - split * g.chunk);
  };
  auto fetch = [&](int stage) {
    while (fu >= flen) {   // a warp may have no unit of an item
      if (ft >= t1) return;
      ft += teams;
      fu = part;
      if (ft >= t1) return;
      aim();
    }
    if (lane == 0) {
      expect(mine + stage * 8, UNIT);
      bulk_copy(ring + stage * UNIT, fp + (u64)fu * UNIT, UNIT, mine + stage * 8);
    }
    fu += g.wk;
  };
  aim();
  if (ft < t1)
    for (int i = 0; i < STAGES; i++) fetch(i);

  u32 base;
  asm volatile("mov.u32 %0, 0x60006000;" : "=r"(base));
  float acc[2][NT][4];
  int stage = 0, phase = 0, t = t0 + team, turn = 0;
  for (int i = 0; i < strips; i++) {
    const int s = s0 + i, split = s % g.splits, slot = i % g.buffers, end = min(t1, (s + 1) * g.tiles);
    const int len = min(g.chunk, g.units - split * g.chunk);
    const Block b = list[s / g.splits - b0];
    u32 xn[NT];   // ldmatrix: lanes 8j..8j+7 address 8 rows of the j-th 8 columns; rows beyond the last repeat it
#pragma unroll
    for (int n = 0; n < NT; n++)
      xn[n] = xs + slot * xbytes + (lane / 8) * 16 + min(n * 8 + lane % 8, b.rows - 1) * g.xstride;
    wait_barrier(full + slot * 8, i / g.buffers & 1);   // even without a tile here: arriving below twice would count for others
    for (; t < end; t += teams) {
      const int tile = t - s * g.tiles;
      float mult[4], add[4];
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const u64 row = ((u64)b.expert * g.tiles + tile) * 32 + r * 8 + lane / 4;
        mult[r] = g.row_mult[row];
        add[r] = g.bias && split == 0 ? to_float(g.bias[row]) : 0.f;
      }
#pragma unroll
      for (int j = 0; j < 2 * NT * 4; j++) (&acc[0][0][0])[j] = 0.f;
      for (int u = part; u < len; u += g.wk) {
        wait_barrier(mine + stage * 8, phase);
        Unit v;
        load(v, ring + stage * UNIT);
        __syncwarp();
        fetch(stage);
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
        if (NT > 1 && b.rows <= 8) compute<1>(v, xn, u * 256, base, acc);
        else compute<NT>(v, xn, u * 256, base, acc);
      }
      if (g.wk > 1) {   // the team's first warp adds up, in the order of K
        float4* const p = (float4*)red + (turn * WARPS + warp) * (2 * NT * 32) + lane;
        turn ^= 1;
        if (part)
#pragma unroll
          for (int j = 0; j < 2 * NT; j++) p[j * 32] = *(const float4*)&acc[j / NT][j % NT][0];
        asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(g.wk * 32) : "memory");
        if (part) continue;
        for (int q = 1; q < g.wk; q++)
#pragma unroll
          for (int j = 0; j < 2 * NT; j++) {
            const float4 v = p[(q * 2 * NT + j) * 32];
            float(&c)[4] = acc[j / NT][j % NT];
            c[0] += v.x; c[1] += v.y; c[2] += v.z; c[3] += v.w;
          }
      }
      store(g, b, split, tile, lane, mult, add, acc);
    }
    __syncwarp();
    if (lane == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(empty + slot * 8) : "memory");
  }
}
