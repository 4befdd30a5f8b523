// W4A16 linear for small M: y[M,N] = x[M,K] @ W[N,K]^T * row_mult[N] + bias[N], W in FP4 (E2M1) with block scales.
// M <= 8*NT.
// Compile-time: FMT (0 NVFP4, 1 MXFP4), BF16 (1 bf16, 0 fp16), NT (n-tiles of 8 tokens), WARPS, STAGES (units in flight per
// warp), BULK (weights arrive by 1 bulk copies, SM90, or 0 cp.async, SM80).
#include "few.cuh"
#include "barriers.cuh"

#define THREADS (WARPS * 32)
#define REDS 36                         // floats from one token to the next in a warp's partial tile: no bank conflicts

struct Args {
  const u16* x; const u8* w; const float* row_mult; const u16* bias; u16* y;
  float* part; u32* counter;  // sums of split blocks: two slots per CTA; a counter (zero between calls) per block
  int m, n, k;          // real sizes; k is a multiple of 8
  int units;            // padded K / 128
  int tiles;            // padded N / 32
  int blocks;           // tiles / wn, rounded up: a block is 32*wn rows
  int wn, wk;           // warps along rows and along K; wn * wk == WARPS
  int chunk;            // units of x in shared memory at a time (two buffers), or all of K once if chunk == units
  int xstride;          // bytes from one token to the next in shared memory: chunk * 256 + 16
  int grain;            // units that are not divided among CTAs: g.units keeps blocks whole, 1 balances best
  int batch;            // whole blocks whose warp sums are kept before they are added up
};

// A warp's sums as [token][row], REDS floats from one token to the next; cleared for the next block.
__device__ __forceinline__ void put(float (&acc)[2][NT][4], float* p, int m) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int t = n * 8 + (lane % 4) * 2 + (j & 1);
        if (t < m) p[t * REDS + r * 16 + lane / 4 + (j & 2) * 4] = acc[r][n][j];
        acc[r][n][j] = 0.f;
      }
}
// Four rows of the result of token m, from n on. No load waits for another.
__device__ __forceinline__ void finish(const Args& g, float4 v, int m, int n) {
  float mult[4], add[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bool in = n + i < g.n;
    mult[i] = in ? g.row_mult[n + i] : 0.f;
    add[i] = in && g.bias ? to_float(g.bias[n + i]) : 0.f;
  }
  store4(g, v, make_float4(mult[0], mult[1], mult[2], mult[3]), make_float4(add[0], add[1], add[2], add[3]), m, n);
}

// All (block, unit) pairs, K fastest, are dealt out evenly: each CTA takes one flat range. A block that
// lies in one range is finished there; the sums of a block that is cut meet in g.part.
extern "C" __global__ void __launch_bounds__(THREADS, 1) fp4_small(const __grid_constant__ Args g) {
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int wn = warp / g.wk, wk = warp % g.wk;
  const int total = g.blocks * g.units, ctas = gridDim.x;
  const int share = total / g.grain / ctas, more = total / g.grain - share * ctas;   // the first `more` take one more
  auto begin = [&](int c) { return (c * share + min(c, more)) * g.grain; };
  const int f0 = begin(blockIdx.x), f1 = begin(blockIdx.x + 1);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif

  // Weights first. Each warp has a ring of its own and runs STAGES units ahead: flat units f0+wk, f0+wk+g.wk, ...
  int pf = f0 + wk, pb = pf / g.units, pu = pf - pb * g.units;
  const u32 ring = smem_addr(smem) + warp * (STAGES * UNIT);
  u8* const xs = smem + WARPS * STAGES * UNIT + (BULK ? WARPS * STAGES * 8 : 0);
#if BULK
  const u32 bars = smem_addr(smem) + WARPS * STAGES * UNIT + warp * STAGES * 8;
  if (lane == 0) {
    for (int i = 0; i < STAGES; i++) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(bars + i * 8));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncwarp();
#endif
  auto fetch = [&](int stage) {
    if (pf < f1 && pb * g.wn + wn < g.tiles) {
      const u8* p = g.w + ((u64)(pb * g.wn + wn) * g.units + pu) * UNIT;
#if BULK
      if (lane == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bars + stage * 8), "r"(UNIT));
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         ring + stage * UNIT), "l"(p), "r"(UNIT), "r"(bars + stage * 8) : "memory");
      }
#else
      const u32 d = ring + stage * UNIT;
#pragma unroll
      for (int i = 0; i < UNIT / 512; i++) cp_async(d + i * 512 + lane * 16, p + i * 512 + lane * 16, 16);
      if (lane < SCALE_BYTES % 512 / 16) cp_async(d + 2048 + lane * 16, p + 2048 + lane * 16, 16);
#endif
    }
#if !BULK
    asm volatile("cp.async.commit_group;");
#endif
    pf += g.wk;
    pu += g.wk;
    if (pu >= g.units) { pu -= g.units; pb++; }   // g.wk <= g.units
  };

  // x: columns of `len` units, zeros beyond K. Whatever an earlier kernel may have written is read after the wait.
  const int xbytes = g.m * g.xstride;
  const bool resident = g.chunk == g.units;
  float* const red = (float*)(xs + (resident ? 1 : 2) * xbytes);
  auto fetch_x = [&](int u, int len, int buffer) {
    const u32 d = smem_addr(xs) + buffer * xbytes;
    const int pieces = len * 16, xwarp = len / 2 + len % 2, all = xwarp * g.m;
    const int turn = (u64)blockIdx.x * all / ctas;  // each CTA begins elsewhere, lest all ask one L2 slice at a time
    for (int j = warp; j < all; j += WARPS) {
      const int i = j + turn < all ? j + turn : j + turn - all;
      const int m = i / xwarp, c = (i - m * xwarp) * 32 + lane, k = u * 128 + c * 8;
      if (c < pieces) {
        const bool in = k < g.k;
        cp_async(d + m * g.xstride + c * 16, in ? g.x + (u64)m * g.k + k : g.x, in ? 16 : 0);
      }
    }
  };
  auto chunk_len = [&](int f, int u) { return min(min(g.chunk, g.units - u), f1 - f); };

  int f = f0, b = f0 / g.units, u = f0 - b * g.units;
#if BULK  // without bulk copies x's group must be the first to be waited for
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(i);
#endif
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (resident) fetch_x(0, g.units, 0);
  else fetch_x(u, chunk_len(f, u), 0);
  asm volatile("cp.async.commit_group;" ::: "memory");
#if !BULK
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(i);
#endif

  u32 xn[NT];  // ldmatrix: lanes 8j..8j+7 address 8 tokens of the j-th 8 columns; tokens beyond M repeat the last one
#pragma unroll
  for (int n = 0; n < NT; n++)
    xn[n] = smem_addr(xs) + (lane / 8) * 16 + min(n * 8 + lane % 8, g.m - 1) * g.xstride;
  const int wred = g.m * REDS, quads = 8 * g.wn * g.m;
  u32 base;
  asm volatile("mov.u32 %0, 0x60006000;" : "=r"(base));
  float acc[2][NT][4];
#pragma unroll
  for (int i = 0; i < 2 * NT * 4; i++) (&acc[0][0][0])[i] = 0.f;

  int mine = f0 + wk, stage = 0, phase = 0, buffer = 0, kept = 0;   // `mine`: this warp's next flat unit
  bool first = true;
  while (f < f1) {
    const int len = chunk_len(f, u);
    if (!resident || first) {
#if !BULK
      if (first) asm volatile("cp.async.wait_group %0;" ::"n"(STAGES) : "memory");
      else
#endif
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      __syncthreads();   // this chunk has arrived, and all have finished with the other buffer
      if (!resident && f + len < f1) {
        const int u2 = u + len == g.units ? 0 : u + len;
        fetch_x(u2, chunk_len(f + len, u2), buffer ^ 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
      }
    }
    const int tile = b * g.wn + wn;
    const int xoff = buffer * xbytes + (resident ? u : 0) * 256;
    while (mine < f + len) {
      const int i0 = stage;
#pragma unroll
      for (int i = 0; i < STAGES; i++) {
        if (i < i0 || mine >= f + len) continue;
        const int off = xoff + (mine - f) * 256;
        if (tile < g.tiles) {
#if BULK
          wait_barrier(bars + i * 8, phase);
#else
          asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
          __syncwarp();
#endif
          Unit v;
          load(v, ring + i * UNIT);
          __syncwarp();
          fetch(i);
          compute(v, xn, off, base, acc);
        }
        mine += g.wk;
        stage = i + 1;
      }
      if (stage == STAGES) { stage = 0; phase ^= 1; }
    }
    f += len;
    u += len;
    buffer ^= !resident;
    if (u == g.units || f == f1) {  // the block, or this CTA's part of it, is done: add up the warps that split K
      if (resident && kept == 0 && !first) __syncthreads();
      put(acc, red + (kept * WARPS + warp) * wred, g.m);
      if (++kept == g.batch || f == f1) {
        __syncthreads();
        const bool whole = u == g.units && f0 <= b * g.units;
        float* const slot = g.part + (u64)(2 * blockIdx.x + (f0 <= b * g.units)) * 32 * g.wn * g.m;
        for (int o = tid; o < quads * kept; o += THREADS) {
          const int row = o % 8 * 4, i = o / 8 / g.m, m = o / 8 - i * g.m, d = i / g.wn, w = i - d * g.wn;
          const float* q = red + (d * WARPS + w * g.wk) * wred + m * REDS + row;
          float4 v = *(const float4*)q;
#pragma unroll 8
          for (int j = 1; j < g.wk; j++) v = add4(v, *(const float4*)(q + j * wred));
          if (!whole) __stcg((float4*)slot + o, v);
          else finish(g, v, m, ((b - kept + 1 + d) * g.wn + w) * 32 + row);
        }
        kept = 0;
      }
      if (u == g.units) { u = 0; b++; }
    }
    first = false;
  }

  // Blocks that are cut: the last CTA to arrive adds up the parts in the order of K, so the result is always the same.
  const int bl = f0 / g.units, bh = (f1 - 1) / g.units;
  const bool cutl = f0 > bl * g.units || f1 < (bl + 1) * g.units, cuth = bh > bl && f1 < (bh + 1) * g.units;
  if (f0 == f1 || (!cutl && !cuth)) return;
  __shared__ u32 last[2];
  auto owner = [&](int v) {
    const int cut = more * (share + 1);   // only where the grain is 1
    return v < cut ? v / (share + 1) : more + (v - cut) / share;
  };
  __syncthreads();
  if (tid < 2) {
    const int blk = tid ? bh : bl;
    u32 is_last = 0;
    if (tid ? cuth : cutl) {
      const u32 parts = owner((blk + 1) * g.units - 1) - owner(blk * g.units);
      __threadfence();   // after the barrier: covers what all threads of this CTA wrote
      is_last = atomicInc(g.counter + blk, parts) == parts;
      __threadfence();
    }
    last[tid] = is_last;
  }
  __syncthreads();
#pragma unroll 1
  for (int j = 0; j < 2; j++) {
    if (!last[j]) continue;
    const int blk = j ? bh : bl, c0 = owner(blk * g.units), c1 = owner((blk + 1) * g.units - 1);
    for (int o = tid; o < quads; o += THREADS) {
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
      for (int c = c0; c <= c1; c++)
        v = add4(v, __ldcg((const float4*)(g.part + (u64)(2 * c + (begin(c) <= blk * g.units)) * 32 * g.wn * g.m) + o));
      const int w = o / 8 / g.m, m = o / 8 - w * g.m;
      if (blk * g.wn + w < g.tiles) finish(g, v, m, (blk * g.wn + w) * 32 + o % 8 * 4);
    }
  }
}
