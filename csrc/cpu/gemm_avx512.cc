// The panel kernel for AVX-512 F, BW, VL, DQ: float32 products of exactly converted operands.
#if defined(__x86_64__)

#include "cpu/avx512_panel.h"

namespace jax_marlin_moe::cpu {
namespace {

struct Float32Math {
  static constexpr int kVectors = 4;    // k = 2t, 2t + 1, 2t + 8, 2t + 9, each four times
  static constexpr int kSumWeight = 1;  // `sum` is over the row before it is expanded

  static JMM_INLINE void Expand(const uint16_t* x, Element type, float* out, int stride, __m512* sum) {
    const __m512 values = LoadElements(x, type);
    const __m512i even = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const int offset[4] = {0, 1, 8, 9};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i index = _mm512_add_epi32(even, _mm512_set1_epi32(offset[j]));
      _mm512_store_ps(out + j * stride, _mm512_permutexvar_ps(index, values));
    }
    *sum = _mm512_add_ps(*sum, values);
  }

  // vpermps reads the low four bits of a lane, so a shifted word needs no mask to be an index.
  template <int R>
  static JMM_INLINE void AddLine(const int32_t* line, const float* x, __m512 (&acc)[R][2]) {
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const int shift[4] = {0, 16, 4, 20};
    const __m512i words = _mm512_loadu_si512(line);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        const __m512 codes = _mm512_permutexvar_ps(_mm512_srli_epi32(words, shift[j] + 8 * b), table);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r][b] = _mm512_fmadd_ps(codes, _mm512_load_ps(x + (j * R + r) * kVectorFloats), acc[r][b]);
        }
      }
    }
  }
};

}  // namespace

void Avx512Panel(const Panel& panel) { RunPanel<Float32Math>(panel); }

}  // namespace jax_marlin_moe::cpu

#endif  // defined(__x86_64__)
