// What the kernels over wgmma share: a ring of stages in shared memory that copies fill and warpgroups read. SM90.
// A stage is 128 columns: of x, two swizzled halves of 64, then the units of ROWS rows of W.
// Compile-time: NTOK (tokens), WGS (warpgroups of 64 rows), STAGES.
#define THREADS (WGS * 128)           // that compute; one more warpgroup fetches
#define REGS (WGS == 4 ? 112 : WGS == 3 ? 160 : 232)   // of a computing thread; 32 of a fetching one: what the launch gave
#define ROWS (WGS * 64)
#define TILES (ROWS / 32)
#define XTILE (NTOK * 256)
#define STAGE ((XTILE + TILES * UNIT + 1023) / 1024 * 1024)

struct __align__(64) TensorMap { u64 v[16]; };
struct Ring { u32 data, barriers; int stage, phase; };

// A stage's barriers: it is full; it may be filled again.
__device__ __forceinline__ u32 full(const Ring& ring, int stage) { return ring.barriers + stage * 8; }
__device__ __forceinline__ u32 empty(const Ring& ring, int stage) { return ring.barriers + (STAGES + stage) * 8; }
__device__ __forceinline__ void advance(Ring& ring) {
  if (++ring.stage == STAGES) { ring.stage = 0; ring.phase ^= 1; }
}
// The box of x whose first column and row these are.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& x, int column, int row, u32 bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(&x), "r"(column), "r"(row), "r"(bar) : "memory");
}
// v, computed once: ptxas would do it again in every round.
__device__ __forceinline__ u32 kept(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// A descriptor of x, whose low half is given: 8 rows in 1024 bytes, swizzled.
__device__ __forceinline__ u64 descriptor(u32 x) { return (u64)0x40000040 << 32 | x; }

// acc = the sum over so many stages. `product(a, x)` adds STEPS matrix instructions of 16 columns each, and commits them
// together; x is the low half of the first one's descriptor, 2 more for every further one.
template <int STEPS, class Product>
__device__ __forceinline__ void multiply_stages(Ring& ring, int stages, float (&acc)[NTOK / 2], int warp, int lane,
                                                Product product) {
  const int r = warp % 2;
  u32 base;
  asm volatile("mov.u32 %0, 0x60006000;" : "=r"(base));
  const u32 weights = ring.data + XTILE + warp / 2 * UNIT;
  const u32 codes = kept(weights + r * 1024 + lane * 16), scale = kept(weights + 2048 + (FMT ? 0 : r * 128) + lane / 4 * 16);
  const u32 x = (ring.data >> 4) | 1 << 16;
#pragma unroll
  for (int i = 0; i < NTOK / 2; i++) acc[i] = 0.f;
  u32 before = 0;
  for (int i = 0; i < stages; i++) {
    wait_barrier(full(ring, ring.stage), ring.phase);
    const u32 at = ring.stage * STAGE;
    const uint4 q[2] = {lds16(codes + at), lds16(codes + at + 512)}, sc = lds16(scale + at);
    u32 a[2][STEPS][4];
#pragma unroll
    for (int p = 0; p < 8 / STEPS; p++) {
      u32 (&part)[STEPS][4] = a[p % 2];
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (p == 1) {   // all that read the previous stage is done
        if (i && lane == 0) arrive(before);
        before = empty(ring, ring.stage);
      }
#pragma unroll
      for (int j = 0; j < STEPS; j += 2) {
        const int c = (p * STEPS + j) / 2;
        fragments(c % 2 ? q[c / 2].z : q[c / 2].x, c % 2 ? q[c / 2].w : q[c / 2].y, sc, c, r, base, part[j], part[j + 1]);
      }
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      product(part, x + at / 16 + p * STEPS / 4 * (NTOK * 128 / 16) + p * STEPS % 4 * 2);
    }
    advance(ring);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  if (lane == 0) arrive(before);
}

// What a thread's rows g and g + 8 are multiplied by, and what is added.
struct Rows { float mult[2], add[2]; };

// The CTA's rows begin with `first` of the matrix's `rows`; those before `matrix` belong to others.
template <class Args>
__device__ __forceinline__ Rows load_rows(const Args& g, int matrix, int first, int rows, int warp, int lane) {
  Rows found;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int at = matrix + min(first + warp * 16 + h * 8 + lane / 4, rows - 1);
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(found.mult[h]) : "l"(g.row_mult + at));   // volatile: well before its use
    u16 add = 0;
    if (g.bias) asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(add) : "l"(g.bias + at));
    found.add[h] = to_float(add);
  }
  return found;
}

// Two results side by side.
__device__ __forceinline__ u32 pair(float low, float high) {
  u32 v;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}
