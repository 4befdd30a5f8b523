// Around the matrix kernels of experts: which rows go to which expert, and the weighted sum of what comes back.
// A slot is one expert of one token: slot = token * top_k + j.
// Compile-time: BF16; WIDE (fp4_sum reads 1: 16-bit numbers, 0: float32); KEPT (slots of a thread of fp4_route that stay in
// registers; any others are read twice). FMT is of no account.
#include "fp4.cuh"
#define ACT 0
#include "experts.cuh"

#define ROUTE 1024   // threads

struct RouteArgs {
  const int* ids; const int* map;
  int* count; Block* blocks; int* source; int* position;
  int slots, numbers, experts, block;
};

// An expert's blocks are even, in steps of 16 rows: none is a stump.
__device__ __forceinline__ int even(int rows, int n, int block) {
  return block < 16 || n < 2 ? block : ((rows + n - 1) / n + 15) / 16 * 16;
}

// One CTA: counts, offsets, sorted order, blocks. Atomics decide the order of an expert's rows, which no result depends on.
extern "C" __global__ void __launch_bounds__(ROUTE, 1) fp4_route(const __grid_constant__ RouteArgs g) {
  extern __shared__ int counts[];
  __shared__ u64 sums[ROUTE / 32];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  asm volatile("griddepcontrol.launch_dependents;");
  for (int e = tid; e < g.experts; e += ROUTE) counts[e] = 0;
  int expert[KEPT], rank[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int p = tid + i * ROUTE;
    expert[i] = p < g.slots ? local_expert(g.ids[p], g.map, g.numbers, g.experts) : -1;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    if (expert[i] >= 0) rank[i] = atomicAdd(&counts[expert[i]], 1);
  for (int p = tid + KEPT * ROUTE; p < g.slots; p += ROUTE) {
    const int e = local_expert(g.ids[p], g.map, g.numbers, g.experts);
    g.position[p] = e < 0 ? -1 : atomicAdd(&counts[e], 1);
  }
  __syncthreads();

  // Rows (high half) and blocks (low half) of all experts before this thread's.
  const int each = (g.experts + ROUTE - 1) / ROUTE, e0 = min(tid * each, g.experts), e1 = min(e0 + each, g.experts);
  u64 own = 0;
  for (int e = e0; e < e1; e++) own += (u64)counts[e] << 32 | (u32)((counts[e] + g.block - 1) / g.block);
  u64 upto = own;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const u64 v = __shfl_up_sync(~0u, upto, i);
    if (lane >= i) upto += v;
  }
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  if (warp == 0) {
    u64 v = sums[lane];
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const u64 before = __shfl_up_sync(~0u, v, i);
      if (lane >= i) v += before;
    }
    sums[lane] = v;
  }
  __syncthreads();
  const u64 total = sums[ROUTE / 32 - 1];
  u64 before = upto - own + (warp ? sums[warp - 1] : 0);
  for (int e = e0; e < e1; e++) {
    const int rows = counts[e], first = before >> 32, b = (u32)before, n = (rows + g.block - 1) / g.block;
    const int each = even(rows, n, g.block);
    for (int i = 0; i < n; i++) g.blocks[b + i] = {e, first + i * each, min(each, rows - i * each), n << 16 | i};
    counts[e] = first;
    before += (u64)rows << 32 | (u32)n;
  }
  if (tid == 0) *(int4*)g.count = make_int4((u32)total, 0, 0, 0);   // and the tickets
  __syncthreads();

#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int p = tid + i * ROUTE;
    if (p >= g.slots) break;
    const int to = expert[i] < 0 ? -1 : counts[expert[i]] + rank[i];
    g.position[p] = to;
    if (to >= 0) g.source[to] = p;
  }
  for (int p = tid + KEPT * ROUTE; p < g.slots; p += ROUTE) {
    const int r = g.position[p];
    if (r < 0) continue;
    const int to = counts[local_expert(g.ids[p], g.map, g.numbers, g.experts)] + r;
    g.position[p] = to;
    g.source[to] = p;
  }
  for (int p = (int)(total >> 32) + tid; p < g.slots; p += ROUTE) g.source[p] = -1;
}

struct GatherArgs { const u16* x; const int* position; u16* y; int tokens, top_k, k; };

// y[position[slot]] = x[slot / top_k], rows of k numbers; k is a multiple of 8. A thread takes 8 numbers of a token.
// x is read before the wait: it is older than fp4_route, which lets this kernel begin.
extern "C" __global__ void __launch_bounds__(256) fp4_gather(const __grid_constant__ GatherArgs g) {
  const u32 pieces = g.k / 8, i = blockIdx.x * 256 + threadIdx.x, t = i / pieces, c = i - t * pieces;
  const bool in = t < g.tokens;
  uint4 v;
  if (in) v = *(const uint4*)(g.x + (u64)t * g.k + c * 8);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
  if (!in) return;
  for (int j = 0; j < g.top_k; j++) {
    const int to = g.position[t * g.top_k + j];
    if (to >= 0) *(uint4*)(g.y + (u64)to * g.k + c * 8) = v;
  }
}

struct SumArgs {
  const u8* parts; const int* position; const float* weights; u16* y;
  const int* ids; const int* map;   // where position is null: each slot is where it is, if its expert is here
  int tokens, top_k, n, slots, splits, numbers, experts;
};

#define V (WIDE ? 8 : 4)   // numbers in 16 bytes
#define SLOTS 8            // of a token that are loaded at a time

// y[token] = the sum over j of weights[token][j] * parts[..][position[token][j]], rows of n numbers.
// parts: [splits][slots][n], which add up to a slot's result. n is a multiple of 8. A thread takes V numbers of a token.
// Where the slots are is read before the wait: fp4_route ended before the kernel in front began.
extern "C" __global__ void __launch_bounds__(128) fp4_sum(const __grid_constant__ SumArgs g) {
  const u32 pieces = g.n / V, i = blockIdx.x * 128 + threadIdx.x, t = i / pieces, c = i - t * pieces;
  const bool in = t < g.tokens;
  float sum[V];
#pragma unroll
  for (int v = 0; v < V; v++) sum[v] = 0.f;
  for (int j0 = 0; j0 < g.top_k; j0 += SLOTS) {
    int from[SLOTS];
    float weight[SLOTS];
#pragma unroll
    for (int j = 0; j < SLOTS; j++) {
      const bool here = in && j0 + j < g.top_k;
      const int slot = t * g.top_k + j0 + j;
      from[j] = -1;
      if (here && g.position) from[j] = g.position[slot];
      if (here && !g.position && local_expert(g.ids[slot], g.map, g.numbers, g.experts) >= 0) from[j] = slot;
      weight[j] = here ? g.weights[slot] : 0.f;
    }
    if (j0 == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int s = 0; s < g.splits; s++) {
      uint4 q[SLOTS];
#pragma unroll
      for (int j = 0; j < SLOTS; j++) {
        const u8* p = g.parts + (((u64)s * g.slots + from[j]) * g.n + c * V) * (WIDE ? 2 : 4);
        if (from[j] >= 0) q[j] = __ldcg((const uint4*)p);
      }
#pragma unroll
      for (int j = 0; j < SLOTS; j++) {
        if (from[j] < 0) continue;
        const u32 w[4] = {q[j].x, q[j].y, q[j].z, q[j].w};
#pragma unroll
        for (int v = 0; v < V; v++)
#if WIDE
          sum[v] += weight[j] * to_float((u16)(w[v / 2] >> v % 2 * 16));
#else
          sum[v] += weight[j] * __uint_as_float(w[v]);
#endif
      }
    }
  }
  if (!in) return;
  u32 h[V / 2];
#pragma unroll
  for (int v = 0; v < V / 2; v++) h[v] = from_float(sum[2 * v]) | (u32)from_float(sum[2 * v + 1]) << 16;
  u16* y = g.y + (u64)t * g.n + c * V;
#if WIDE
  *(uint4*)y = make_uint4(h[0], h[1], h[2], h[3]);
#else
  *(uint2*)y = make_uint2(h[0], h[1]);
#endif
}
