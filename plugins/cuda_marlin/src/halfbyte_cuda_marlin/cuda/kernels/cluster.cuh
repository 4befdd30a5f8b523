// CTAs that run side by side and reach into each other's shared memory. SM90.
__device__ __forceinline__ u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ int cluster_size() { int n; asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n)); return n; }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Without waiting for what this thread has written: where that is fenced already, or only reading must have ended.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// An address of this CTA's shared memory, as that of the same place of the CTA of this rank.
__device__ __forceinline__ u32 mapped(u32 addr, u32 rank) {
  u32 a;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(addr), "r"(rank));
  return a;
}
// Barriers across the cluster: arrive at another CTA's, and wait at the own for what others have written.
__device__ __forceinline__ void arrive_at(u32 bar, u32 rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapped(bar, rank)) : "memory");
}
__device__ __forceinline__ void wait_cluster_barrier(u32 bar, int parity) {
  asm volatile("{\n.reg .pred p;\nWAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@!p bra WAIT;\n}"
               ::"r"(bar), "r"(parity) : "memory");
}
// 16 bytes to mapped memory; the mapped barrier there counts them when they have arrived.
__device__ __forceinline__ void store_at(u32 to, const float* v, u32 bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(bar) : "memory");
}
