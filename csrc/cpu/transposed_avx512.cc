// The transposed kernel, compiled for AVX-512 F, BW, VL, DQ.
#if defined(__x86_64__)

// GCC's own definition of the "undefined" operand of its intrinsics sets it off (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/transposed_segment.h"

namespace jax_marlin_moe::cpu {

void Avx512Transposed(const TransposedSegment& segment) { RunSegment(segment); }

}  // namespace jax_marlin_moe::cpu

#endif  // defined(__x86_64__)
