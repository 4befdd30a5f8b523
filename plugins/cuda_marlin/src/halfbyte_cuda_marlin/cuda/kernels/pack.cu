// Canonical packed values [n, k/2] into the units that the matrix kernels read; one thread makes 16 bytes.
// lut[8][256] says what each byte of a couple becomes (packing.byte_table): the layout has one definition, in Python.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;
struct Args { const u8* src; const u8* scales; const u64* lut; u8* dst; int n, kb, group, units, tiles, unit; };

extern "C" __global__ void __launch_bounds__(256) fp4_pack(const __grid_constant__ Args g) {
  __shared__ u64 lut[8][256];
  for (int i = threadIdx.x; i < 2048; i += 256) lut[0][i] = g.lut[i];
  __syncthreads();
  const u64 total = (u64)g.tiles * g.units * 128;
  for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < total; i += (u64)gridDim.x * 256) {
    const int lane = i % 32, b = i / 32 % 4;          // b: 16-row tile, half of the 128 columns
    const u64 tu = i / 128, tile = tu / g.units, unit = tu % g.units;
    u64 v[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < 2; c++)
#pragma unroll
      for (int j = 0; j < 8; j++) {                   // j: row g or g+8, k16 step, half of the step
        const int row = tile * 32 + b / 2 * 16 + j / 4 * 8 + lane / 4;
        const int col = unit * 64 + b % 2 * 32 + c * 16 + j % 4 * 4 + lane % 4;   // in bytes
        if (row < g.n && col < g.kb) {
          // A group whose scale is zero becomes zero codes: the E5M3 scales of bf16 have no zero.
          const bool zero = g.group == 16 && (g.scales[(u64)row * (g.kb / 8) + col / 8] & 0x7F) == 0;
          if (!zero) v[c] |= lut[j][g.src[(u64)row * g.kb + col]];
        }
      }
    *(ulonglong2*)(g.dst + tu * g.unit + b * 512 + lane * 16) = make_ulonglong2(v[0], v[1]);
  }
}
