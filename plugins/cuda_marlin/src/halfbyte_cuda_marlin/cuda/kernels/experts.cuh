// What the matrix kernels of experts share: a block of routed rows, and the activation function between the projections.
// Compile-time: ACT (0 none, 1 silu, 2 gelu_tanh, 3 swigluoai, 4 relu2). Needs fp4.cuh before it.

// Rows that go to one expert: rows first .. first + rows - 1 in sorted order. `place` is the block's number within its
// expert, and 65536 times how many blocks that expert has.
struct __align__(16) Block { int expert, first, rows, place; };

// The number of a slot's expert here, or -1. map: the numbers of all experts here, or null where all are; an id is one of
// `numbers`.
__device__ __forceinline__ int local_expert(int id, const int* map, int numbers, int experts) {
  const int e = (u32)id < (u32)numbers ? (map ? map[id] : id) : -1;
  return (u32)e < (u32)experts ? e : -1;
}

#if ACT
__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }

// In float32; relu2 has no gate. Comparisons, not fminf: NaN must stay NaN.
__device__ __forceinline__ float activate(float gate, float up) {
#if ACT == 1
  return gate * sigmoid(gate) * up;
#elif ACT == 2
  return gate * sigmoid(1.5957691216f * (gate + 0.044715f * gate * gate * gate)) * up;   // 1 + tanh(v) = 2 sigmoid(2v)
#elif ACT == 3
  gate = gate > 7.f ? 7.f : gate;
  up = up > 7.f ? 7.f : up < -7.f ? -7.f : up;
  return (up + 1.f) * (gate * sigmoid(1.702f * gate));
#else
  up = up < 0.f ? 0.f : up;
  return up * up;
#endif
}
#endif
