// W4A16 linear for few rows of x on cards with clusters: two CTAs share a block of W, and each takes half of K.
// So a CTA needs half of x, sums meet in the partner's shared memory, and N is dealt out among half as many workers.
// Compile-time: FMT (0 NVFP4, 1 MXFP4), BF16 (1 bf16, 0 fp16), NT (n-tiles of 8 tokens), WARPS, STAGES (units in flight per
// warp).
#include "few.cuh"
#include "barriers.cuh"
#include "cluster.cuh"

#define THREADS (WARPS * 32)

#define XBUF 4                          // chunks of x in shared memory
#define RING ((WARPS * STAGES * (UNIT + 8) + 15) / 16 * 16)   // all warps' rings, and their barriers

struct Args {
  const u16* x; const u8* w; const float* row_mult; const u16* bias; u16* y;
  float* part; u32* counter;  // not used
  int m, n, k;          // real sizes; k is a multiple of 8
  int units;            // padded K / 128
  int tiles;            // padded N / 32
  int wn, wk;           // warps along rows and along K; wn * wk == WARPS; a block is 32*wn rows
  int chunk;            // units of x that arrive together: a multiple of wk, unless one is all
  int xstride;          // bytes from one token to the next in shared memory: chunk * 256 + 16
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) fp4_pair(const __grid_constant__ Args g) {
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int wn = warp / g.wk, wk = warp % g.wk, rank = cluster_rank(), block = blockIdx.x / 2;
  const int half = (g.units + 1) / 2, first = rank * half, own = rank ? g.units - half : half;   // units of K
  asm volatile("griddepcontrol.launch_dependents;");

  // Weights first: they are not made by the kernel in front. Each warp has a ring of its own.
  const int tile = block * g.wn + wn;
  const u32 ring = smem_addr(smem) + warp * (STAGES * UNIT), bars = smem_addr(smem) + WARPS * STAGES * UNIT + warp * STAGES * 8;
  if (lane == 0) {
    for (int i = 0; i < STAGES; i++) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(bars + i * 8));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncwarp();
  int next = tile < g.tiles ? wk : own;
  auto fetch = [&](int stage) {
    if (lane == 0 && next < own) {
      const u32 bar = bars + stage * 8;
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(UNIT));
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       ring + stage * UNIT), "l"(g.w + ((u64)tile * g.units + first + next) * UNIT), "r"(UNIT), "r"(bar) : "memory");
    }
    next += g.wk;
  };
  for (int i = 0; i < STAGES; i++) fetch(i);
  asm volatile("griddepcontrol.wait;" ::: "memory");

  // x: chunk after chunk of this CTA's columns, zeros beyond K. Some warps for each row, or some rows for each warp.
  u8* const xs = smem + RING;
  const int xbytes = g.m * g.xstride, across = g.m < WARPS ? WARPS / g.m : 1, row = warp / across;
  const int column = (warp % across * 32 + lane) * 8;
  const u16* const from = g.x + (u64)row * g.k + first * 128 + column;
  int xu = 0, xslot = 0;
  auto fetch_x = [&]() {
    if (xu < own) {
      const int size = min(g.chunk, own - xu) * 128, room = g.k - (first + xu) * 128;
      for (int m = row; m < g.m; m += WARPS) {
        const u16* p = from + (u64)(m - row) * g.k + xu * 128;
        const u32 d = smem_addr(xs) + xslot * xbytes + m * g.xstride;
        for (int c = column; c < size; c += across * 256, p += across * 256)
          cp_async(d + c * 2, c < room ? p : g.x, c < room ? 16 : 0);
      }
      xu += g.chunk;
      if (++xslot == XBUF) xslot = 0;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int i = 0; i < XBUF - 1; i++) fetch_x();

  u32 xn[NT];  // ldmatrix: lanes 8j..8j+7 address 8 tokens of the j-th 8 columns; tokens beyond M repeat the last one
#pragma unroll
  for (int n = 0; n < NT; n++)
    xn[n] = smem_addr(xs) + (lane / 8) * 16 + min(n * 8 + lane % 8, g.m - 1) * g.xstride;
  u32 base;
  asm volatile("mov.u32 %0, 0x60006000;" : "=r"(base));
  float acc[2][NT][4];
#pragma unroll
  for (int i = 0; i < 2 * NT * 4; i++) (&acc[0][0][0])[i] = 0.f;

  int stage = 0, phase = 0, slot = 0;
  for (int begin = 0; begin < own; begin += g.chunk) {
    asm volatile("cp.async.wait_group %0;" ::"n"(XBUF - 2) : "memory");
    __syncthreads();   // this chunk has arrived, and all have finished with the one before
    fetch_x();
    if (tile < g.tiles)
      for (int u = wk; u < min(g.chunk, own - begin); u += g.wk) {
        wait_barrier(bars + stage * 8, phase);
        Unit v;
        const u32 a = ring + stage * UNIT;
#pragma unroll
        for (int j = 0; j < 4; j++) v.w[j] = lds16(a + j * 512 + lane * 16);
#pragma unroll
        for (int j = 0; j < SV; j++) v.s[j] = lds16(a + 2048 + j * 128 + (lane / 4) * 16);
        __syncwarp();
        fetch(stage);
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
        compute(v, xn, slot * xbytes + u * 256, base, acc);
      }
    if (++slot == XBUF) slot = 0;
  }

  // Sums of all warps, over x; added up in the order of K, each CTA doing half of the block.
  float* const red = (float*)xs;
  const int wred = g.m * REDS, all = 8 * g.wn * g.m, middle = all / 2;
  __syncthreads();
  put(acc, red + warp * wred, g.m);
  cluster_arrive();
  cluster_wait();
  for (int o = (rank ? middle : 0) + tid; o < (rank ? all : middle); o += THREADS) {
    const int row = o % 8 * 4, w = o / 8 / g.m, m = o / 8 - w * g.m;
    const u32 q = smem_addr(red + w * g.wk * wred + m * REDS + row);
    float4 v = lds_of(q, 0);
#pragma unroll 4
    for (int j = 1; j < g.wk; j++) v = add4(v, lds_of(q + j * wred * 4, 0));
#pragma unroll 4
    for (int j = 0; j < g.wk; j++) v = add4(v, lds_of(q + j * wred * 4, 1));
    store4(g, v, m, (block * g.wn + w) * 32 + row);
  }
  cluster_arrive_relaxed();   // the partner may still read here
  cluster_wait();
}
