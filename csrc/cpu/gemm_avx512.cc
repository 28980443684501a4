// The panel kernel for AVX-512 F, BW, VL, DQ: float32 products of exactly converted operands.
#if defined(__x86_64__)

#include "cpu/avx512_panel.h"

namespace jax_marlin_moe::cpu {
namespace {

// k = 2t + kOffset[j] is code j of a column in the words of one t.
constexpr int kOffset[4] = {0, 1, 8, 9};

struct Int4 {
  static constexpr float kCenter = 8;
  static JMM_INLINE __m512 Values() { return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7); }
};

struct E2M1 {
  static constexpr float kCenter = 0;
  static JMM_INLINE __m512 Values() {
    return _mm512_setr_ps(0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6);
  }
};

// 4-bit codes, looked up.
template <class Type>
struct NibbleMath {
  static constexpr int kBits = 4;
  static constexpr float kCenter = Type::kCenter;
  static constexpr int kSegmentTiles = 16;
  static constexpr int kVectors = 4;    // j, lanes [t] four times
  static constexpr int kSumWeight = 1;  // `sum` is over the row before it is expanded

  static JMM_INLINE void Expand(const uint16_t* x, Element type, float* out, int stride, __m512* sum) {
    const __m512 values = LoadElements(x, type);
    const __m512i even = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i index = _mm512_add_epi32(even, _mm512_set1_epi32(kOffset[j]));
      _mm512_store_ps(out + j * stride, _mm512_permutexvar_ps(index, values));
    }
    *sum = _mm512_add_ps(*sum, values);
  }

  // vpermps reads the low four bits of a lane, so a shifted word needs no mask to be an index.
  template <int R>
  static JMM_INLINE void AddColumn(const int32_t* line, const float* x, __m512 (&acc)[R][2]) {
    const __m512 table = Type::Values();
    const int shift[4] = {0, 16, 4, 20};
    const __m512i words = _mm512_loadu_si512(line);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        const __m512 values = _mm512_permutexvar_ps(_mm512_srli_epi32(words, shift[j] + 8 * b), table);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r][b] = _mm512_fmadd_ps(values, _mm512_load_ps(x + (j * R + r) * kVectorFloats), acc[r][b]);
        }
      }
    }
  }

  static JMM_INLINE __m512 SumColumns(const __m512 (&first)[2], const __m512 (&second)[2]) {
    return SumLanes(first[0], first[1], second[0], second[1]);
  }
};

// Of the codes in the top byte of each lane, anything below.
struct Int8 {
  static constexpr float kCenter = 128;
  static JMM_INLINE __m512 Values(__m512i top) {  // flipping the top bit makes q - 128 in two's complement
    const __m512i flipped = _mm512_xor_si512(top, _mm512_set1_epi32(static_cast<int>(0x80000000)));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(flipped, 24));
  }
};

template <int kExponentBits>
struct FloatByte {
  static constexpr float kCenter = 0;
  static JMM_INLINE __m512 Values(__m512i top) { return FloatsFromFloatBytes<kExponentBits>(top); }
};

// 8-bit codes, computed. Two lines a col, each with an accumulator of its own.
template <class Type>
struct ByteMath {
  static constexpr int kBits = 8;
  static constexpr float kCenter = Type::kCenter;
  static constexpr int kSegmentTiles = 8;  // or x of four rows would fill the first-level cache
  static constexpr int kVectors = 8;       // [line][j], lanes [t % 2] eight times
  static constexpr int kSumWeight = 1;     // `sum` is over the row before it is expanded

  static JMM_INLINE void Expand(const uint16_t* x, Element type, float* out, int stride, __m512* sum) {
    const __m512 values = LoadElements(x, type);
    const __m512i even = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
#pragma GCC unroll 2
    for (int line = 0; line < 2; ++line) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i index = _mm512_add_epi32(even, _mm512_set1_epi32(4 * line + kOffset[j]));
        _mm512_store_ps(out + (4 * line + j) * stride, _mm512_permutexvar_ps(index, values));
      }
    }
    *sum = _mm512_add_ps(*sum, values);
  }

  template <int R>
  static JMM_INLINE void AddColumn(const int32_t* lines, const float* x, __m512 (&acc)[R][2]) {
    const int up[4] = {24, 8, 16, 0};  // from byte 0, 2, 1, 3 to the top
#pragma GCC unroll 2
    for (int line = 0; line < 2; ++line) {
      const __m512i words = _mm512_loadu_si512(lines + line * kLineWords);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512 values = Type::Values(up[j] == 0 ? words : _mm512_slli_epi32(words, up[j]));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const float* vector = x + ((4 * line + j) * R + r) * kVectorFloats;
          acc[r][line] = _mm512_fmadd_ps(values, _mm512_load_ps(vector), acc[r][line]);
        }
      }
    }
  }

  // Lanes of an accumulator are [t % 2][w][b].
  static JMM_INLINE __m512 SumColumns(const __m512 (&first)[2], const __m512 (&second)[2]) {
    const __m512 a = _mm512_add_ps(first[0], first[1]);
    const __m512 b = _mm512_add_ps(second[0], second[1]);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 16, 18, 20, 22, 17, 19, 21, 23);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
  }
};

// Weights of 16 bits, converted. A line is the [w][b][half of k] of one t, a word a pair of rows 2t and 2t + 1.
template <Element kType>
struct WholeMath {
  static constexpr int kBits = 16;
  static constexpr float kCenter = 0;
  static constexpr int kSegmentTiles = 8;  // or x of four rows would fill the first-level cache
  static constexpr int kVectors = 8;       // [t][odd], lanes [half] eight times
  static constexpr int kSumWeight = 1;     // `sum` is over the row before it is expanded

  static JMM_INLINE void Expand(const uint16_t* x, Element type, float* out, int stride, __m512* sum) {
    const __m512 values = LoadElements(x, type);
    const __m512i halves = _mm512_setr_epi32(0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const __m512i index = _mm512_add_epi32(halves, _mm512_set1_epi32(v));
      _mm512_store_ps(out + v * stride, _mm512_permutexvar_ps(index, values));
    }
    *sum = _mm512_add_ps(*sum, values);
  }

  template <int R>
  static JMM_INLINE void AddColumn(const int32_t* lines, const float* x, __m512 (&acc)[R][2]) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const __m512i words = _mm512_loadu_si512(lines + t * kLineWords);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const __m512 values = Values(words, odd);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const float* vector = x + ((2 * t + odd) * R + r) * kVectorFloats;
          acc[r][odd] = _mm512_fmadd_ps(values, _mm512_load_ps(vector), acc[r][odd]);
        }
      }
    }
  }

  // Lanes of an accumulator are [w][b][half].
  static JMM_INLINE __m512 SumColumns(const __m512 (&first)[2], const __m512 (&second)[2]) {
    const __m512 a = _mm512_add_ps(first[0], first[1]);
    const __m512 b = _mm512_add_ps(second[0], second[1]);
    const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 16, 20, 24, 28, 18, 22, 26, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
  }

 private:
  // The lower or the upper halves of words.
  static JMM_INLINE __m512 Values(__m512i words, int odd) {
    if constexpr (kType == Element::kBf16) {
      const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
      return _mm512_castsi512_ps(odd ? _mm512_and_si512(words, upper) : _mm512_slli_epi32(words, 16));
    } else {
      return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(odd ? _mm512_srli_epi32(words, 16) : words));
    }
  }
};

}  // namespace

void Avx512Panel(const Panel& panel) {
  switch (panel.weight.code) {
    case Code::kInt4:
      return RunPanel<NibbleMath<Int4>>(panel);
    case Code::kE2M1:
      return RunPanel<NibbleMath<E2M1>>(panel);
    case Code::kInt8:
      return RunPanel<ByteMath<Int8>>(panel);
    case Code::kBf16:
      return RunPanel<WholeMath<Element::kBf16>>(panel);
    case Code::kFp16:
      return RunPanel<WholeMath<Element::kF16>>(panel);
#define JMM_RUN(name, call_name, exponent_bits) \
  case Code::k##name:                           \
    return RunPanel<ByteMath<FloatByte<exponent_bits>>>(panel);
      JMM_FLOAT_BYTES(JMM_RUN)
#undef JMM_RUN
  }
}

}  // namespace jax_marlin_moe::cpu

#endif  // defined(__x86_64__)
