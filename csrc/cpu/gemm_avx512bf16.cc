// The panel kernel for AVX-512 with BF16: pair products of vdpbf16ps, accumulated in float32.
//
// The values of 4-bit codes are exact in bfloat16, and so is x: a bfloat16 as it is, a float16 as the sum of two
// bfloat16. The instruction takes subnormal bfloat16 values (below 1.2e-38) as zero. 8-bit codes gain nothing: to
// bring them to bfloat16 takes more instructions than their products.
#if defined(__x86_64__)

#include "cpu/avx512_panel.h"

namespace jax_marlin_moe::cpu {
namespace {

JMM_INLINE __m512bh AsBf16(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

// The values of the codes in bfloat16.
struct Int4 {
  static constexpr float kCenter = 8;
  static JMM_INLINE __m256i Values() {
    return _mm256_setr_epi16(short(0xC100), short(0xC0E0), short(0xC0C0), short(0xC0A0), short(0xC080), short(0xC040),
                             short(0xC000), short(0xBF80), 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0,
                             0x40E0);
  }
};

struct E2M1 {
  static constexpr float kCenter = 0;
  static JMM_INLINE __m256i Values() {
    return _mm256_setr_epi16(0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0, short(0x8000),
                             short(0xBF00), short(0xBF80), short(0xBFC0), short(0xC000), short(0xC040), short(0xC080),
                             short(0xC0C0));
  }
};

// Parts is how many bfloat16 rows make a row of x.
template <class Type, int Parts>
struct Bf16Math {
  static constexpr int kBits = 4;
  static constexpr float kCenter = Type::kCenter;
  static constexpr int kSegmentTiles = 16;
  static constexpr int kVectors = 2 * Parts;  // pairs k = (2t, 2t + 1) and (2t + 8, 2t + 9), each four times
  static constexpr int kSumWeight = 4;        // `sum` is over the expanded pairs

  static JMM_INLINE void ExpandPart(__m256i row, float* out, int stride, __m512* sum) {
    const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i ones = _mm512_set1_epi16(0x3F80);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i index = _mm512_add_epi32(quarter, _mm512_set1_epi32(4 * half));
      const __m512i pairs = _mm512_permutexvar_epi32(index, _mm512_castsi256_si512(row));
      _mm512_store_si512(out + half * stride, pairs);
      *sum = _mm512_dpbf16_ps(*sum, AsBf16(pairs), AsBf16(ones));
    }
  }

  static JMM_INLINE void Expand(const uint16_t* x, Element, float* out, int stride, __m512* sum) {
    const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    if constexpr (Parts == 1) {
      ExpandPart(row, out, stride, sum);
    } else {
      const __m512 values = _mm512_cvtph_ps(row);
      const __m256i high = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
      const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      // Infinities and NaN live in the first part; the second would make NaN of both.
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(values), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
      const __m512 rest = _mm512_maskz_sub_ps(finite, values, rounded);
      ExpandPart(high, out, stride, sum);
      ExpandPart(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest)), out + 2 * stride, stride, sum);
    }
  }

  // The halves of a shifted word are the indices of a pair. vpermw reads five bits of each, the lowest bit of
  // the next code among them, so the table holds every value twice.
  template <int R>
  static JMM_INLINE void AddColumn(const int32_t* line, const float* x, __m512 (&acc)[R][2]) {
    const __m512i table = _mm512_broadcast_i64x4(Type::Values());
    const __m512i words = _mm512_loadu_si512(line);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        const __m512i values = _mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * half + 8 * b), table);
#pragma GCC unroll 2
        for (int part = 0; part < Parts; ++part) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const __m512i pairs = _mm512_load_si512(x + ((2 * part + half) * R + r) * kVectorFloats);
            acc[r][b] = _mm512_dpbf16_ps(acc[r][b], AsBf16(values), AsBf16(pairs));
          }
        }
      }
    }
  }

  static JMM_INLINE __m512 SumColumns(const __m512 (&first)[2], const __m512 (&second)[2]) {
    return SumLanes(first[0], first[1], second[0], second[1]);
  }
};

template <class Type>
void RunNibbles(const Panel& panel) {
  if (panel.x_type == Element::kBf16) {
    RunPanel<Bf16Math<Type, 1>>(panel);
  } else {
    RunPanel<Bf16Math<Type, 2>>(panel);
  }
}

}  // namespace

void Avx512Bf16Panel(const Panel& panel) {
  switch (panel.weight.code) {
    case Code::kInt4:
      return RunNibbles<Int4>(panel);
    case Code::kE2M1:
      return RunNibbles<E2M1>(panel);
    case Code::kInt8:
    case Code::kBf16:
    case Code::kFp16:
#define JMM_CASE(name, call_name, exponent_bits) case Code::k##name:
      JMM_FLOAT_BYTES(JMM_CASE)
#undef JMM_CASE
      return Avx512Panel(panel);
  }
}

}  // namespace jax_marlin_moe::cpu

#endif  // defined(__x86_64__)
