// W4A16 linear for many rows of x, SM90: wgmma with the decoded weights as A from registers, x as B in shared memory.
// An item is ROWS rows of W times NTOK rows of x. The CTAs of a cluster share each item: each multiplies a part of K, then
// finishes a part of the tokens, for which the others send it their sums.
// Compile-time: FMT, BF16, NTOK (tokens of an item), WGS (warpgroups of 64 rows), STAGES (of 128 columns).
#include "fp4.cuh"
#include "barriers.cuh"
#include "cluster.cuh"
#include "ring.cuh"
#include "wgmma.cuh"   // nvrtc.py writes it: wgmma names every register

#define STEPS (WGS != 3 && NTOK <= 128 ? 2 : 4)   // of 16 columns, that are decoded and committed together
#define SLICE 16                 // tokens that are finished together
#define SLICES (NTOK / SLICE)
#define SUMS (THREADS * 32)      // bytes of a slice's sums
#define STAGING 512              // bytes in which a warp turns a slice

struct Args {
  const u16* x; const u8* w; const float* row_mult; const u16* bias; u16* y;
  float* part; u32* counter;   // not used
  int m, n, units, tiles;      // units of 128 columns, tiles of 32 rows
  int items, ttiles;           // of NTOK rows of x
};

struct Cluster { int rank, size, first, units; };   // the units of K that this CTA multiplies
struct Item { int tile, token; };                   // the first of its tiles and of its rows of x

// Barriers besides the stages': all others have drained their rings; their sums have landed here; they have been added.
__device__ __forceinline__ u32 drained(const Ring& ring) { return ring.barriers + 2 * STAGES * 8; }
__device__ __forceinline__ u32 landed(const Ring& ring) { return ring.barriers + (2 * STAGES + 1) * 8; }
__device__ __forceinline__ u32 added(const Ring& ring) { return ring.barriers + (2 * STAGES + 2) * 8; }

// Items that run at the same time have the same rows of W.
__device__ __forceinline__ Item find(const Args& g, int i) { return {i / g.ttiles * TILES, i % g.ttiles * NTOK}; }

// Runs `fetch(item, unit, stage's data, barrier)` for all that this CTA multiplies.
template <class Fetch>
__device__ __forceinline__ void fetch_all(const Args& g, Ring ring, const Cluster& own, Fetch fetch) {
  int turn = 0;
  ring.phase = 1;
  for (int i = blockIdx.x / own.size; i < g.items; i += gridDim.x / own.size) {
    const Item item = find(g, i);
    if (own.size > 1 && turn) wait_barrier(added(ring), turn - 1 & 1);
    turn++;
#pragma unroll 1
    for (int u = own.first; u < own.first + own.units; u++) {
      wait_barrier(empty(ring, ring.stage), ring.phase);
      fetch(item, u, ring.data + ring.stage * STAGE, full(ring, ring.stage));
      advance(ring);
    }
  }
}

__device__ __forceinline__ void fetch_weights(const Args& g, const Ring& ring, const Cluster& own, int lane) {
  fetch_all(g, ring, own, [&](const Item& item, int u, u32 data, u32 bar) {
    const int tiles = min(g.tiles - item.tile, TILES);
    if (lane == 0) expect(bar, tiles * UNIT);
    __syncwarp();
    if (lane < tiles) bulk_copy(data + XTILE + lane * UNIT, g.w + ((u64)(item.tile + lane) * g.units + u) * UNIT, UNIT, bar);
  });
}

__device__ __forceinline__ void fetch_x(const Args& g, const TensorMap& xmap, const Ring& ring, const Cluster& own, int lane) {
  fetch_all(g, ring, own, [&](const Item& item, int u, u32 data, u32 bar) {
    if (lane == 0) expect(bar, XTILE);
    __syncwarp();
    if (lane < 2) copy_box(data + lane * NTOK * 128, xmap, u * 128 + lane * 64, item.token, bar);
  });
}

__device__ __forceinline__ void multiply(Ring& ring, const Cluster& own, float (&acc)[NTOK / 2], int warp, int lane) {
  multiply_stages<STEPS>(ring, own.units, acc, warp, lane, [&](const u32 (&a)[STEPS][4], u32 x) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) wgmma(acc, a[i], descriptor(x + i * 2));
    commit();
  });
}

// The CTAs of a cluster own the slices in turn. An owner finishes its slices, for which the others send it their sums: those
// of slice s land in its ring, at the place of slice s - owner + sender.
__device__ __forceinline__ int next_owner(const Cluster& own, int owner) { return owner + 1 == own.size ? 0 : owner + 1; }
__device__ __forceinline__ u32 landing(const Ring& ring, int place, int tid) { return ring.data + place * SUMS + tid * 16; }

__device__ __forceinline__ void send(const Ring& ring, const Cluster& own, const float (&acc)[NTOK / 2], int slices, int turn,
                                     int tid) {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");   // nobody reads this ring any more
  if (tid == 0) {
    expect(landed(ring), (slices - own.rank + own.size - 1) / own.size * (own.size - 1) * SUMS);
    for (int peer = 0; peer < own.size; peer++)
      if (peer != own.rank) arrive_at(drained(ring), peer);
  }
  wait_cluster_barrier(drained(ring), turn & 1);
#pragma unroll
  for (int s = 0, owner = 0; s < SLICES; s++, owner = next_owner(own, owner)) {
    if (s >= slices || owner == own.rank) continue;
    const u32 to = mapped(landing(ring, s - owner + own.rank, tid), owner), bar = mapped(landed(ring), owner);
#pragma unroll
    for (int j = 0; j < 2; j++) store_at(to + j * THREADS * 16, acc + 8 * s + 4 * j, bar);
  }
}

// The others' sums are added to this CTA's own in the order of their ranks.
__device__ __forceinline__ void receive(const Ring& ring, const Cluster& own, float (&acc)[NTOK / 2], int slices, int turn,
                                        int tid, int lane) {
  wait_cluster_barrier(landed(ring), turn & 1);
#pragma unroll
  for (int s = 0, owner = 0; s < SLICES; s++, owner = next_owner(own, owner)) {
    if (s >= slices || owner != own.rank) continue;
    for (int sender = 0; sender < own.size; sender++) {
      if (sender == own.rank) continue;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const uint4 v = lds16(landing(ring, s - owner + sender, tid) + j * THREADS * 16);
        float* const sums = acc + 8 * s + 4 * j;
        sums[0] += __uint_as_float(v.x); sums[1] += __uint_as_float(v.y);
        sums[2] += __uint_as_float(v.z); sums[3] += __uint_as_float(v.w);
      }
    }
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");   // the ring is the copies' again
  __syncwarp();
  if (lane == 0) arrive(added(ring));
}

// 8 results of a token, the first of which is column `col`.
__device__ __forceinline__ void store(const Args& g, int token, int col, const uint4& v) {
  u16* const y = g.y + (u64)token * g.n + col;
  if (g.n % 8 == 0) {
    if (col < g.n) *(uint4*)y = v;
    return;
  }
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (col + i < g.n) y[i] = (u16)(words[i / 2] >> i % 2 * 16);
}

// A warp's 16 rows x 16 tokens at a time, turned in shared memory so that a thread stores 8 results of a token at once.
__device__ __forceinline__ u32 piece_at(int token, int piece) { return (token * 2 + (piece ^ token / 4 % 2)) * 16; }

__device__ __forceinline__ void finish(const Args& g, const Cluster& own, const Item& item, const float (&acc)[NTOK / 2],
                                       const Rows& rows, int slices, u32 staging, int warp, int lane) {
  const u32 to = staging + warp * STAGING + piece_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const u32 from = staging + warp * STAGING + piece_at(lane / 2, lane % 2);
  const int col = item.tile * 32 + warp * 16 + lane % 2 * 8;
#pragma unroll
  for (int s = 0, owner = 0; s < SLICES; s++, owner = next_owner(own, owner)) {
    if (s >= slices || owner != own.rank) continue;
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* const sums = acc + 8 * s + 2 * i;
      const float mult = rows.mult[i % 2], add = rows.add[i % 2];
      v[i] = pair(sums[0] * mult + add, sums[1] * mult + add);
    }
    __syncwarp();
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3]) : "memory");
    __syncwarp();
    const int token = item.token + s * SLICE + lane / 2;
    if (token < g.m) store(g, token, col, lds16(from));
  }
}

__device__ __forceinline__ void compute(const Args& g, Ring& ring, const Cluster& own, u32 staging, int tid) {
  const int warp = tid / 32, lane = tid % 32;
  int turn = 0;
  for (int i = blockIdx.x / own.size; i < g.items; i += gridDim.x / own.size, turn++) {
    const Item item = find(g, i);
    const Rows rows = load_rows(g, 0, item.tile * 32, g.n, warp, lane);
    const int slices = min(SLICES, (g.m - item.token + SLICE - 1) / SLICE);
    float acc[NTOK / 2];
    multiply(ring, own, acc, warp, lane);
    if (own.size > 1) {
      send(ring, own, acc, slices, turn, tid);
      receive(ring, own, acc, slices, turn, tid, lane);
    }
    finish(g, own, item, acc, rows, slices, staging, warp, lane);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    fp4_wide(const __grid_constant__ Args g, const __grid_constant__ TensorMap xmap) {
  extern __shared__ __align__(1024) u8 smem[];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  asm volatile("griddepcontrol.launch_dependents;");
  const u32 data = (smem_addr(smem) + 1023) & ~1023u, staging = data + STAGES * STAGE;
  Ring ring = {data, staging + WGS * 4 * STAGING, 0, 0};
  const int rank = cluster_rank(), size = cluster_size(), first = g.units * rank / size;
  const Cluster own = {rank, size, first, g.units * (rank + 1) / size - first};
  if (tid == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(full(ring, i), 2);
      init_barrier(empty(ring, i), WGS * 4);
    }
    init_barrier(drained(ring), max(size - 1, 1));
    init_barrier(landed(ring), 1);
    init_barrier(added(ring), WGS * 4);
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  cluster_arrive();
  cluster_wait();
  if (__shfl_sync(~0u, tid / 128, 0) == WGS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (warp == WGS * 4) {
      fetch_weights(g, ring, own, lane);
    } else if (warp == WGS * 4 + 1) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      fetch_x(g, xmap, ring, own, lane);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGS));
    asm volatile("griddepcontrol.wait;" ::: "memory");   // bias and y are touched below
    compute(g, ring, own, staging, tid);
  }
}
