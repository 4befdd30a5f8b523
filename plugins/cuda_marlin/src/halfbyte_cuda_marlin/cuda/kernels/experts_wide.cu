// Grouped W4A16 product for experts with many rows each, SM90: wgmma as in wide.cu, but every item is whole along K.
// An item is a block of the routing (up to NTOK sorted rows of one expert) times ROWS rows of its weights. Its matrix
// instructions are as wide as its rows need, in steps of NSTEP.
// Compile-time: FMT, BF16, ACT (experts.cuh), NTOK, NSTEP, WGS (warpgroups of 64 rows), STAGES (of 128 columns),
// BUFFERS (1 or 2, for results on their way out).
#include "fp4.cuh"
#include "barriers.cuh"
#include "ring.cuh"
#include "experts.cuh"
#include "wgmma.cuh"   // nvrtc.py writes it: one wgmma for each number of tokens, by the number of its sums

#define BOX (NSTEP * 128)        // NSTEP rows x 64 columns of x
#define SLICE 16                 // tokens
#define PIECES (ACT == 0 || ACT == 4 ? 8 : 4)   // of 8 results, that a warpgroup's 64 rows make for a token

struct Args {
  const u8* w; const float* row_mult; const u16* bias; u16* y; const int* count; const Block* blocks; int* ticket;
  int n, units, tiles, parts;   // columns of y; of an expert's weights: units along K, tiles of 32 rows, parts of ROWS rows
};

struct Item { int expert, first, rows, part; };   // first sorted row, rows; part of the expert's weights

// A stage's third barrier: its weights are on their way, and `items` says whose they are.
__device__ __forceinline__ u32 named(const Ring& ring, int stage) { return ring.barriers + (2 * STAGES + stage) * 8; }

// Item i of all; `near` is what lane l loaded: block number i / parts - 16 + l. The blocks of an expert come one after the
// other for each part of its weights, so that CTAs that run at the same time read the same weights.
__device__ __forceinline__ Item find(const Args& g, int i, const int4& near) {
  const int at = i / g.parts, last = __shfl_sync(~0u, near.w, 16), place = last & 0xFFFF, count = (u32)last >> 16;
  const int own = i - (at - place) * g.parts, lane = 16 - place + own % count;
  int4 block = make_int4(__shfl_sync(~0u, near.x, lane), __shfl_sync(~0u, near.y, lane), __shfl_sync(~0u, near.z, lane), 0);
  if (count > 16) block = __ldcg((const int4*)g.blocks + at - place + own % count);
  return {block.x, block.y, block.z, own / count};
}

// One warp fetches weights, which need not wait for the kernel in front, and deals out the items. It looks two items
// ahead, so that nothing waits for the answers.
__device__ __forceinline__ void fetch_weights(const Args& g, Ring ring, Item* items, int lane) {
  const int blocks = __ldcg(g.count), total = blocks * g.parts;
  auto near = [&](int i) { return __ldcg((const int4*)g.blocks + max(0, min(i / g.parts - 16 + lane, blocks - 1))); };
  auto draw = [&] { return lane == 0 ? gridDim.x + atomicAdd(g.ticket, 1) : 0; };
  int i = blockIdx.x, next = __shfl_sync(~0u, draw(), 0);
  int4 known = near(i);
  while (i < total) {
    const Item item = find(g, i, known);
    known = near(next);
    const int after = draw(), tile = item.part * TILES, tiles = min(g.tiles - tile, TILES);
    const u8* w = g.w + (u64)(item.expert * g.tiles + tile + lane) * g.units * UNIT;
    wait_barrier(empty(ring, ring.stage), ring.phase);
    if (lane == 0) items[ring.stage] = item;
#pragma unroll 1
    for (int u = 0; u < g.units; u++, w += UNIT) {
      const u32 bar = full(ring, ring.stage);
      wait_barrier(empty(ring, ring.stage), ring.phase);
      if (lane == 0) {
        arrive(named(ring, ring.stage));
        expect(bar, tiles * UNIT);
      }
      __syncwarp();
      if (lane < tiles)
        bulk_copy(ring.data + ring.stage * STAGE + XTILE + lane * UNIT, w, UNIT, bar);
      advance(ring);
    }
    i = next;
    next = __shfl_sync(~0u, after, 0);
  }
  wait_barrier(empty(ring, ring.stage), ring.phase);
  if (lane == 0) {
    items[ring.stage].rows = 0;   // no more
    arrive(named(ring, ring.stage));
    arrive(full(ring, ring.stage));
  }
}

// Another fetches x, for the items that the first one names.
__device__ __forceinline__ void fetch_x(const Args& g, const TensorMap& xmap, Ring ring, const Item* items, int lane) {
  const int half = lane % 2, box = lane / 2;
  while (true) {
    wait_barrier(named(ring, ring.stage), ring.phase);
    const Item item = items[ring.stage];
    if (item.rows == 0) break;
    const int boxes = (item.rows + NSTEP - 1) / NSTEP;
#pragma unroll 1
    for (int u = 0; u < g.units; u++) {
      const u32 bar = full(ring, ring.stage);
      wait_barrier(named(ring, ring.stage), ring.phase);
      if (lane == 0) expect(bar, boxes * 2 * BOX);
      __syncwarp();
      if (box < boxes)
        copy_box(ring.data + ring.stage * STAGE + half * NTOK * 128 + box * BOX, xmap, u * 128 + half * 64,
                 item.first + box * NSTEP, bar);
      advance(ring);
    }
  }
  if (lane == 0) arrive(full(ring, ring.stage));
}

// A warpgroup's results go through shared memory, SLICE tokens at a time, so that a thread stores 8 of a token at once.
// The places of these pieces are mixed so that neither side has bank conflicts.
__device__ __forceinline__ u32 piece_at(int token, int piece) {
  return (token * PIECES + (piece ^ (token / (8 / PIECES) % PIECES))) * 16;
}

__device__ __forceinline__ void finish(const Args& g, const Item& item, const float (&acc)[NTOK / 2], const Rows& rows,
                                       u32 staging, int tid) {
  const int warp = tid / 32 % 4, lane = tid % 32, group = tid / 128, own = tid % 128;
  const u32 buffers = staging + group * BUFFERS * SLICE * PIECES * 16;
  const u32 to = PIECES == 8 ? piece_at(lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2) : piece_at(lane % 16, warp);
  const int col = (item.part * WGS + group) * PIECES * 8 + own % PIECES * 8;
#pragma unroll
  for (int s = 0; s < NTOK / SLICE; s++) {
    if (s * SLICE >= item.rows) break;
    const u32 buffer = buffers + s % BUFFERS * SLICE * PIECES * 16;
    u32 v[PIECES / 2];
#pragma unroll
    for (int j = 0; j < 2; j++) {   // 8 tokens each
      float r[4];
#pragma unroll
      for (int i = 0; i < 4; i++) r[i] = acc[8 * s + 4 * j + i] * rows.mult[i / 2] + rows.add[i / 2];
#if ACT == 1 || ACT == 2 || ACT == 3   // 8 rows of the gate, then the same 8 of up
      v[j] = pair(activate(r[0], r[2]), activate(r[1], r[3]));
#else
#if ACT == 4
#pragma unroll
      for (int i = 0; i < 4; i++) r[i] = activate(0.f, r[i]);
#endif
      v[2 * j] = pair(r[0], r[1]);
      v[2 * j + 1] = pair(r[2], r[3]);
#endif
    }
    if (BUFFERS == 1 || s == 0) asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
#if PIECES == 8
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(buffer + to), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(buffer + to), "r"(v[0]), "r"(v[1])
                 : "memory");
#endif
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
    const int token = own / PIECES, t = s * SLICE + token;
    if ((PIECES == 8 || own < 64) && t < item.rows && col < g.n)
      *(uint4*)(g.y + (u64)(item.first + t) * g.n + col) = lds16(buffer + piece_at(token, own % PIECES));
  }
}

// 64 columns of K, by the narrowest matrix instructions that hold all rows: between LOW and HIGH tokens wide. `x` is the
// low half of a descriptor. The branches are here and not around the loop because the accumulators must stay where they
// are: else ptxas lets no two matrix instructions overlap.
template <int LOW, int HIGH>
__device__ __forceinline__ void step(float (&acc)[NTOK / 2], const u32 (&a)[4][4], u32 x, int rows) {
  if constexpr (LOW < HIGH) {
    constexpr int MIDDLE = (LOW + HIGH) / 2 / NSTEP * NSTEP;
    if (rows > MIDDLE) return step<MIDDLE + NSTEP, HIGH>(acc, a, x, rows);
    return step<LOW, MIDDLE>(acc, a, x, rows);
  }
  float (&own)[LOW / 2] = reinterpret_cast<float (&)[LOW / 2]>(acc);
#pragma unroll
  for (int i = 0; i < 4; i++) wgmma(own, a[i], descriptor(x + i * 2));
  commit();
}

// What a warpgroup does where the weights have no rows for it any more.
__device__ __forceinline__ void skip(const Args& g, Ring& ring, int lane) {
  for (int u = 0; u < g.units; u++) {
    wait_barrier(full(ring, ring.stage), ring.phase);
    if (lane == 0) arrive(empty(ring, ring.stage));
    advance(ring);
  }
}

__device__ __forceinline__ void multiply(const Args& g, Ring& ring, const Item& item, u32 staging, int tid) {
  const int warp = tid / 32, lane = tid % 32;
  if (item.part * TILES + __shfl_sync(~0u, warp / 4, 0) * 2 >= g.tiles) return skip(g, ring, lane);
  const Rows rows = load_rows(g, item.expert * g.tiles * 32, item.part * ROWS, g.tiles * 32, warp, lane);
  float acc[NTOK / 2];
  multiply_stages<4>(ring, g.units, acc, warp, lane,
                     [&](const u32 (&a)[4][4], u32 x) { step<NSTEP, NTOK>(acc, a, x, item.rows); });
  finish(g, item, acc, rows, staging, tid);
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    fp4_experts_wide(const __grid_constant__ Args g, const __grid_constant__ TensorMap xmap) {
  extern __shared__ __align__(1024) u8 smem[];
  __shared__ Item items[STAGES];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const u32 data = (smem_addr(smem) + 1023) & ~1023u;
  const u32 staging = data + STAGES * STAGE, barriers = staging + WGS * BUFFERS * SLICE * PIECES * 16;
  Ring ring = {data, barriers, 0, 0};
  if (tid == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(full(ring, i), 2);
      init_barrier(empty(ring, i), WGS * 4);
      init_barrier(named(ring, i), 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (__shfl_sync(~0u, tid / 128, 0) == WGS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (warp == WGS * 4) {
      ring.phase = 1;
      fetch_weights(g, ring, items, lane);
    } else if (warp == WGS * 4 + 1) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      asm volatile("griddepcontrol.launch_dependents;");   // not before: kernels behind read what was made two in front
      fetch_x(g, xmap, ring, items, lane);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGS));
    while (true) {
      wait_barrier(full(ring, ring.stage), ring.phase);
      const Item item = items[ring.stage];
      if (item.rows == 0) return;
      multiply(g, ring, item, staging, tid);
    }
  }
}
