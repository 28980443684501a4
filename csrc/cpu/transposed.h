// The contract between the transposed product and its instruction-set kernels: plain data and declarations only, as in
// gemm.h.
//
// x @ W^T reads the same packed tiles as x @ W. Its contraction runs over the columns of W, along which scales vary, so
// they are multiplied into x, group by group; a kernel sees codes alone.
#ifndef JAX_MARLIN_MOE_CPU_TRANSPOSED_H_
#define JAX_MARLIN_MOE_CPU_TRANSPOSED_H_

#include <cstdint>

#include "cpu/gemm.h"

namespace jax_marlin_moe::cpu {

constexpr int kSegmentUnits = 8;  // most units of a segment

// What the values of codes have already subtracted: their zero point is taken as the rest.
constexpr int CenterOf(Code code) { return code == Code::kInt8 ? 128 : 0; }

// Consecutive units of consecutive tiles along k that share their scales.
struct TransposedSegment {
  const int32_t* words;  // of the first unit in the first tile
  int64_t tile_stride;   // words from a tile to the next one along k
  int tiles;
  int units;  // 1 ... kSegmentUnits
  Code code;
  // [rows, units, kUnit] scaled, in Marlin's grouped order: column 16 * w + 8 * b + col of a unit at
  // 8 * col + 2 * w + b.
  const float* x;
  int rows;    // 1 ... kPanelRows
  float* out;  // rows `out_stride` apart, of which tiles * kTileK values are added to
  int64_t out_stride;
};

// out[r, k] += sum over the units' columns n of value(code[k, n]) * x[r, n]. A row's result has the same bits
// whichever rows it comes with.
using TransposedKernel = void (*)(const TransposedSegment& segment);

void PortableTransposed(const TransposedSegment& segment);
#if defined(__x86_64__)
void Avx2Transposed(const TransposedSegment& segment);
void Avx512Transposed(const TransposedSegment& segment);
#endif

// The fastest kernel that this processor runs.
TransposedKernel ActiveTransposedKernel();

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_TRANSPOSED_H_
