// W4A16 linear for few rows of x on cards with clusters: two CTAs share a block of W, and each takes half of K.
// So a CTA needs half of x, and N is dealt out among half as many workers. A CTA's units are dealt out evenly among its
// warps, K fastest: a warp may end in another tile than it began. Sums meet in the CTA, then in the partner's shared memory.
// Compile-time: FMT (0 NVFP4, 1 MXFP4), BF16 (1 bf16, 0 fp16), NT (n-tiles of 8 tokens), WARPS, STAGES (units in flight per
// warp).
#include "few.cuh"
#include "barriers.cuh"
#include "cluster.cuh"

#define THREADS (WARPS * 32)
#define XBUF 4                          // chunks of x in shared memory
#define RING (WARPS * STAGES * UNIT)
#define BARS ((WARPS * STAGES + 2 * XBUF + 1) * 8)   // rings, x full, x empty, sums
#define PART 20                         // floats from one token to the next in a part: 16 rows, and no bank conflicts

struct Args {
  const u16* x; const u8* w; const float* row_mult; const u16* bias; u16* y;
  float* part; u32* counter;  // not used
  int m, n, k;          // real sizes; k is a multiple of 8
  int units;            // padded K / 128
  int tiles;            // padded N / 32
  int wn;               // tiles of a block
  int chunk;            // units of x that arrive together; all of a CTA's are (units + 1) / 2
  int step;             // from one unit of a warp to its next: 1 if a chunk is all, else the warps that share a tile
  int xstride;          // bytes from one token to the next in shared memory: chunk * 256 + 16
  int xs, parts;        // where x and the parts lie in shared memory
};

__device__ __forceinline__ bool elected() {   // one thread of a warp; the compiler knows that it is one
  u32 e;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(e));
  return e;
}
// A bulk copy of what is read once, by a policy that says so.
__device__ __forceinline__ void stream(u32 to, const void* from, int bytes, u32 bar, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
// A warp's sums of a tile, cleared for the next one: the first 16 rows at `to`, the others `second` bytes behind.
__device__ __forceinline__ void put(float (&acc)[2][NT][4], u32 to, int second, int m) {
  const int lane = threadIdx.x % 32;
  to += (lane % 4 * 2 * PART + lane / 4) * 4;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int t = n * 8 + (j & 1), at = (t * PART + (j & 2) * 4) * 4;
      if (t + lane % 4 * 2 < m) {
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + at), "f"(acc[0][n][j]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + second + at), "f"(acc[1][n][j]) : "memory");
      }
      acc[0][n][j] = acc[1][n][j] = 0.f;
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) fp4_pair(const __grid_constant__ Args g) {
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, warp = __shfl_sync(~0u, tid / 32, 0), lane = tid % 32;
  const int rank = cluster_rank(), block = blockIdx.x / 2, here = min(g.wn, g.tiles - block * g.wn);   // tiles
  const int half = (g.units + 1) / 2, first = rank * half, own = rank ? g.units - half : half;   // units of K
  asm volatile("griddepcontrol.launch_dependents;");

  // This warp's `left` units: from u of a tile on, every step-th, then on with the next tile.
  const bool whole = g.chunk == half;
  const int total = g.wn * own, f0 = warp * total / WARPS, f1 = (warp + 1) * total / WARPS;
  const int tile = (f0 + 0.5f) * __frcp_rn(own), u = whole ? f0 - tile * own : warp % g.step;
  const int left = min(whole ? f1 - f0 : (own - u + g.step - 1) / g.step, here * own - f0);
  const int run = whole ? own - u : left + 1;   // of these, the first so many lie in the first tile

  // Weights first: they are not made by the kernel in front. Each warp has a ring of its own.
  const u32 ring = smem_addr(smem) + warp * (STAGES * UNIT), bars = smem_addr(smem) + RING + warp * (STAGES * 8);
  const u32 full = smem_addr(smem) + RING + WARPS * STAGES * 8, empty = full + XBUF * 8, come = empty + XBUF * 8;
  if (elected()) {
    for (int i = 0; i < STAGES; i++) init_barrier(bars + i * 8, 1);
    if (warp == 0) {
      for (int i = 0; i < XBUF; i++) {
        init_barrier(full + i * 8, g.m);
        init_barrier(empty + i * 8, WARPS);
      }
      init_barrier(come, 1);
      expect(come, here * g.m * 64);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncwarp();
  u64 once;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  const u8* from = g.w + ((u64)(block * g.wn + tile) * g.units + first + u) * UNIT;
  int coming = left, until = run;
  auto fetch = [&](int stage) {
    if (coming <= 0) return;
    if (elected()) {
      expect(bars + stage * 8, UNIT);
      stream(ring + stage * UNIT, from, UNIT, bars + stage * 8, once);
    }
    coming--;
    from += g.step * UNIT;
    if (--until == 0) {
      from += (u64)(g.units - own) * UNIT;
      until = own;
    }
  };
  fetch(0);
  __syncthreads();
  cluster_arrive_relaxed();
  asm volatile("griddepcontrol.wait;" ::: "memory");

  // x: chunk after chunk of this CTA's columns, zeros beyond K; a warp for each row.
  const u32 xs = smem_addr(smem) + g.xs;
  const int xbytes = g.m * g.xstride;
  auto fetch_x = [&](int begin, int slot) {
    const int size = min(g.chunk, own - begin) * 256, in = min(size, (g.k - (first + begin) * 128) * 2);
    for (int m = warp; m < g.m; m += WARPS) {
      const u32 to = xs + slot * xbytes + m * g.xstride;
#pragma unroll 1
      for (int c = in + lane * 16; c < size; c += 512)
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to + c), "r"(0) : "memory");
      __syncwarp();
      if (elected()) {
        expect(full + slot * 8, in);
        bulk_copy(to, g.x + (u64)m * g.k + (first + begin) * 128, in, full + slot * 8);
      }
    }
  };
#pragma unroll 1
  for (int i = 0; i < XBUF && i * g.chunk < own; i++) fetch_x(i * g.chunk, i);
#pragma unroll 1
  for (int i = 1; i < STAGES; i++) fetch(i);   // behind x, which would have to wait for them
  // What the rows that this CTA finishes, 16 of each tile, are multiplied by, and their bias: needed at the end.
  float* const mult = (float*)(smem + (RING + BARS + 15) / 16 * 16), * const add = mult + g.wn * 16;
  const int row = (block * g.wn + tid / 16) * 32 + rank * 16 + tid % 16;
  const bool finishes = tid < here * 16 && row < g.n;
  const float times = finishes ? g.row_mult[row] : 0.f, plus = finishes && g.bias ? to_float(g.bias[row]) : 0.f;

  u32 xn[NT];  // ldmatrix: lanes 8j..8j+7 address 8 tokens of the j-th 8 columns; tokens beyond M repeat the last one
#pragma unroll
  for (int n = 0; n < NT; n++)
    xn[n] = xs + (lane / 8) * 16 + min(n * 8 + lane % 8, g.m - 1) * g.xstride;
  u32 base;
  asm volatile("mov.u32 %0, 0x60006000;" : "=r"(base));
  float acc[2][NT][4];
#pragma unroll
  for (int i = 0; i < 2 * NT * 4; i++) (&acc[0][0][0])[i] = 0.f;
  // Parts: [half of the tile's rows][slot][token][row]. A warp's sums of a tile have the slot warp + tile, so that those of one
  // tile follow each other in the order of K.
  const int part = g.m * PART * 4, second = (WARPS + g.wn - 1) * part;
  const u32 parts = smem_addr(smem) + g.parts;
  u32 to = parts + (warp + tile) * part;

  int stage = 0, phase = 0, slot = 0, turn = 0, wrap = run;
  for (int begin = 0; begin < own; begin += g.chunk) {
    wait_barrier(full + slot * 8, turn);
    int now = left, xo = slot * xbytes + u * 256;
    if (!whole) now = left > 0 ? (min(g.chunk, own - begin) - u + g.step - 1) / g.step : 0;
#pragma unroll 1
    for (; now > 0; now--) {
      wait_barrier(bars + stage * 8, phase);
      Unit v;
      load(v, ring + stage * UNIT);
      __syncwarp();
      fetch(stage);
      if (++stage == STAGES) { stage = 0; phase ^= 1; }
      compute(v, xn, xo, base, acc);
      xo += g.step * 256;
      if (--wrap == 0 && now > 1) {
        put(acc, to, second, g.m);
        to += part;
        xo = 0;
        wrap = own;
      }
    }
    if (!whole) {   // the slot of the chunk before is filled again when all warps have left it
      __syncwarp();
      if (elected()) arrive(empty + slot * 8);
      const int before = slot ? slot - 1 : XBUF - 1, next = begin + (XBUF - 1) * g.chunk;
      if (begin > 0 && warp < g.m && next < own) {
        wait_barrier(empty + before * 8, slot ? turn : turn ^ 1);
        fetch_x(next, before);
      }
    }
    if (++slot == XBUF) { slot = 0; turn ^= 1; }
  }
  if (tid < here * 16) {
    mult[tid] = times;
    add[tid] = plus;
  }
  put(acc, to, second, g.m);
  __syncthreads();
  cluster_wait();   // the partner has its barriers

  // Sums of this CTA, in the order of K: of one half of each tile's rows for the partner, of the other for y, where the
  // partner's are added. An item is four rows of one token.
  const int items = here * 4 * g.m;
  const u32 sums = parts + 2 * second;
  const float per_tile = __frcp_rn(g.m), per_unit = __frcp_rn(total);
  auto tile_of = [&](int i) { return int((i / 4 + 0.5f) * per_tile); };
  auto warp_of = [&](int f) { return int(((f + 1) * WARPS - 0.5f) * per_unit); };   // which has this unit
  auto sum = [&](int i, int r) {
    const int t = tile_of(i), m = i / 4 - t * g.m, begin = warp_of(t * own), end = warp_of((t + 1) * own - 1);
    u32 at = parts + r * second + (begin + t) * part + (m * PART + i % 4 * 4) * 4;
    float4 v = lds_floats(at);
#pragma unroll 4
    for (int j = begin; j < end; j++) v = add4(v, lds_floats(at += part));
    return v;
  };
  for (int i = tid; i < items; i += THREADS) {
    const float4 v = sum(i, rank ^ 1);
    store_at(mapped(sums + i * 16, rank ^ 1), &v.x, mapped(come, rank ^ 1));
  }
  for (int i = THREADS - 1 - tid; i < items; i += THREADS) {   // if there are few, other warps do these
    const float4 v = sum(i, rank);
    const int t = tile_of(i), m = i / 4 - t * g.m, r = i % 4 * 4;
    wait_cluster_barrier(come, 0);
    const float4 other = lds_floats(sums + i * 16);
    store4(g, rank ? add4(other, v) : add4(v, other), *(float4*)(mult + t * 16 + r), *(float4*)(add + t * 16 + r), m,
           (block * g.wn + t) * 32 + rank * 16 + r);
  }
  wait_cluster_barrier(come, 0);   // not gone before the partner's sums have come
}
