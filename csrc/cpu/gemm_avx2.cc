// The panel kernel for AVX2, FMA and F16C: float32 products of exactly converted operands.
//
// Zero points are subtracted from the sum, so an infinite x gives NaN where other kernels may give infinity.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/gemm.h"
#include "cpu/lookahead.h"

#define JMM_INLINE __attribute__((always_inline)) inline

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kMaxRows = 4;        // rows that share one dequantisation
constexpr int kSegmentTiles = 16;  // most tiles between two applications of the scale

// k = 2t + kOffset[j] is code j of a column in the words of one t.
constexpr int kOffset[4] = {0, 1, 8, 9};

JMM_INLINE __m256 LoadElements(const uint16_t* values, Element type) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  if (type == Element::kF16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

JMM_INLINE float SumOfLanes(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Floats of 8 bits in the top byte of each lane, anything below. Sign and magnitude, moved to where a float32 has them,
// make the value times 2^(bias - 127): of subnormal codes a subnormal, which this thread keeps (float_mode.h).
// Processors are slow at those, but of weights scaled to the range of e4m3 one in ten thousand is so small.
template <int kExponentBits>
JMM_INLINE __m256 FloatsFromFloatBytes(__m256i top) {
  constexpr int kDown = 8 - kExponentBits, kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr int kPlaces = static_cast<int>(0x80000000u | 0x7Fu << (24 - kDown));
  constexpr float kScale = 0x1p127f / (1u << kBias);
  const __m256i bits = _mm256_and_si256(_mm256_srai_epi32(top, kDown), _mm256_set1_epi32(kPlaces));
  return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(kScale));
}

// 4-bit integers, masked where they stand in their word and converted as they are, 2^shift times too large. The power
// of two is taken back exactly: from x for the four k of a word, from the sum for the half b, 8 bits higher.
struct Int4 {
  static constexpr float kCenter = 0;
  // x vectors, and what of: the last is for the codes at bit 28, which are shifted down, as in place they could convert
  // to a negative.
  static constexpr int kVectors = 5;
  static constexpr int kCode[kVectors] = {0, 1, 2, 3, 3};
  static constexpr float kFactor[kVectors] = {1, 0x1p-16f, 0x1p-4f, 0x1p-20f, 0x1p8f};
  static constexpr float kSumFactor = 0x1p-8f;  // of the half b = 1
  static JMM_INLINE int Vector(int j, int b) { return j == 3 && b == 1 ? 4 : j; }
  static JMM_INLINE __m256 Values(__m256i words, int shift) {
    const __m256i code =
        shift == 28 ? _mm256_srli_epi32(words, 28) : _mm256_and_si256(words, _mm256_set1_epi32(15 << shift));
    return _mm256_cvtepi32_ps(code);
  }
};

// The magnitudes of e2m1 are looked up by the low three bits, all that vpermps reads; the sign is put before them.
struct E2M1 {
  static constexpr float kCenter = 0;
  static constexpr int kVectors = 4;
  static constexpr int kCode[kVectors] = {0, 1, 2, 3};
  static constexpr float kFactor[kVectors] = {1, 1, 1, 1};
  static constexpr float kSumFactor = 1;
  static JMM_INLINE int Vector(int j, int) { return j; }
  static JMM_INLINE __m256 Values(__m256i words, int shift) {
    const __m256 magnitudes = _mm256_setr_ps(0, 0.5, 1, 1.5, 2, 3, 4, 6);
    const __m256i sign =
        _mm256_and_si256(_mm256_slli_epi32(words, 28 - shift), _mm256_set1_epi32(static_cast<int>(0x80000000)));
    const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, _mm256_srli_epi32(words, shift));
    return _mm256_or_ps(magnitude, _mm256_castsi256_ps(sign));
  }
};

// Sums of a col are vectors [b][w] of columns 16 * w + 8 * b + col. The two below are how its words make them:
//   kBits, kCenter      of a code: its width, and the zero point that its value has already subtracted
//   kTileX              floats of one expanded tile of one row
//   Expand<R>           row r of R of a tile; adds the elements to `sum`
//   kParts              vectors of words that a col of a tile has
//   AddPart<R>          acc[r] += the codes of one of them times row r, in two accumulators
//   SumColumn           the sums from the accumulators

// Words of 4-bit codes: lanes [t % 2][w] of two vectors, both halves b inside a word.
template <class Type>
struct NibbleMath {
  static constexpr int kBits = 4;
  static constexpr float kCenter = Type::kCenter;
  static constexpr int kParts = 2;                                 // t / 2
  static constexpr int kTileX = kParts * Type::kVectors * kLanes;  // [part][vector], lanes [t % 2] four times

  template <int R>
  static JMM_INLINE void Expand(const uint16_t* x, Element type, float* out, int r, __m256* sum) {
    const __m256 low = LoadElements(x, type);
    const __m256 high = LoadElements(x + 8, type);
    const __m256i even = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
    *sum = _mm256_add_ps(*sum, _mm256_add_ps(low, high));
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 5
      for (int v = 0; v < Type::kVectors; ++v) {
        const int offset = kOffset[Type::kCode[v]];
        const __m256i index = _mm256_add_epi32(even, _mm256_set1_epi32(4 * part + offset % 8));
        const __m256 values = _mm256_permutevar8x32_ps(offset < 8 ? low : high, index);
        _mm256_store_ps(out + ((part * Type::kVectors + v) * R + r) * kLanes,
                        _mm256_mul_ps(values, _mm256_set1_ps(Type::kFactor[v])));
      }
    }
  }

  template <int R>
  static JMM_INLINE void AddPart(const int32_t* words, int part, const float* x, __m256 (&acc)[R][2]) {
    const int shift[4] = {0, 16, 4, 20};
    const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + part * kLanes));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        const __m256 values = Type::Values(line, shift[j] + 8 * b);
        const int vector = part * Type::kVectors + Type::Vector(j, b);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r][b] = _mm256_fmadd_ps(values, _mm256_load_ps(x + (vector * R + r) * kLanes), acc[r][b]);
        }
      }
    }
  }

  static JMM_INLINE __m256 SumColumn(const __m256 (&acc)[2]) {
    constexpr float kUpper = Type::kSumFactor;
    const __m256 sum =
        _mm256_add_ps(_mm256_permute2f128_ps(acc[0], acc[1], 0x20), _mm256_permute2f128_ps(acc[0], acc[1], 0x31));
    return _mm256_mul_ps(sum, _mm256_setr_ps(1, 1, 1, 1, kUpper, kUpper, kUpper, kUpper));
  }
};

// Of the codes in the top byte of each lane, anything below.
struct Int8 {
  static constexpr float kCenter = 128;
  static JMM_INLINE __m256 Values(__m256i top) {  // flipping the top bit makes q - 128 in two's complement
    const __m256i flipped = _mm256_xor_si256(top, _mm256_set1_epi32(static_cast<int>(0x80000000)));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(flipped, 24));
  }
};

template <int kExponentBits>
struct FloatByte {
  static constexpr float kCenter = 0;
  static JMM_INLINE __m256 Values(__m256i top) { return FloatsFromFloatBytes<kExponentBits>(top); }
};

// Words of 8-bit codes: a vector [w][b] for each t.
template <class Type>
struct ByteMath {
  static constexpr int kBits = 8;
  static constexpr float kCenter = Type::kCenter;
  static constexpr int kParts = 4;       // t
  static constexpr int kTileX = kTileK;  // as they are: a load broadcasts

  template <int R>
  static JMM_INLINE void Expand(const uint16_t* x, Element type, float* out, int r, __m256* sum) {
    const __m256 low = LoadElements(x, type);
    const __m256 high = LoadElements(x + 8, type);
    *sum = _mm256_add_ps(*sum, _mm256_add_ps(low, high));
    _mm256_store_ps(out + r * kTileK, low);
    _mm256_store_ps(out + r * kTileK + 8, high);
  }

  template <int R>
  static JMM_INLINE void AddPart(const int32_t* words, int part, const float* x, __m256 (&acc)[R][2]) {
    const int up[4] = {24, 8, 16, 0};  // from byte 0, 2, 1, 3 to the top
    const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + part * kLanes));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256 values = Type::Values(up[j] == 0 ? line : _mm256_slli_epi32(line, up[j]));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256 element = _mm256_broadcast_ss(x + r * kTileK + 2 * part + kOffset[j]);
        acc[r][part % 2] = _mm256_fmadd_ps(values, element, acc[r][part % 2]);
      }
    }
  }

  static JMM_INLINE __m256 SumColumn(const __m256 (&acc)[2]) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm256_permutevar8x32_ps(_mm256_add_ps(acc[0], acc[1]), order);
  }
};

// Words of 16-bit codes: for each t two vectors [w % 2][b][half of k], a word a pair of rows 2t and 2t + 1.
template <Element kType>
struct WholeMath {
  static constexpr int kBits = 16;
  static constexpr float kCenter = 0;
  static constexpr int kParts = 8;           // [t][w / 2]
  static constexpr int kTileX = 8 * kLanes;  // [t][odd], lanes [half] four times

  template <int R>
  static JMM_INLINE void Expand(const uint16_t* x, Element type, float* out, int r, __m256* sum) {
    const __m256 low = LoadElements(x, type);
    const __m256 high = LoadElements(x + 8, type);
    *sum = _mm256_add_ps(*sum, _mm256_add_ps(low, high));
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const __m256i index = _mm256_set1_epi32(v);
      const __m256 even = _mm256_permutevar8x32_ps(low, index), odd = _mm256_permutevar8x32_ps(high, index);
      _mm256_store_ps(out + (v * R + r) * kLanes, _mm256_blend_ps(even, odd, 0xAA));
    }
  }

  template <int R>
  static JMM_INLINE void AddPart(const int32_t* words, int part, const float* x, __m256 (&acc)[R][2]) {
    const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + part * kLanes));
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m256 values = Values(line, odd);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const float* vector = x + ((part / 2 * 2 + odd) * R + r) * kLanes;
        acc[r][part % 2] = _mm256_fmadd_ps(values, _mm256_load_ps(vector), acc[r][part % 2]);
      }
    }
  }

  static JMM_INLINE __m256 SumColumn(const __m256 (&acc)[2]) {
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);  // from [w % 2][w / 2][b]
    return _mm256_permutevar8x32_ps(_mm256_hadd_ps(acc[0], acc[1]), order);
  }

 private:
  // The lower or the upper halves of words.
  static JMM_INLINE __m256 Values(__m256i words, int odd) {
    if constexpr (kType == Element::kBf16) {
      const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
      return _mm256_castsi256_ps(odd ? _mm256_and_si256(words, upper) : _mm256_slli_epi32(words, 16));
    } else {
      const __m256i low = odd ? _mm256_srli_epi32(words, 16) : _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF));
      const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0xD8);
      return _mm256_cvtph_ps(_mm256_castsi256_si128(narrow));
    }
  }
};

// Eight consecutive floats of type `type` as float32, from entry `index` on.
JMM_INLINE __m256 LoadFloats(const void* values, Scale type, int64_t index) {
  if (type == Scale::kBf16) return LoadElements(static_cast<const uint16_t*>(values) + index, Element::kBf16);
  if (type == Scale::kF16) return LoadElements(static_cast<const uint16_t*>(values) + index, Element::kF16);
  if (type == Scale::kF32) return _mm256_loadu_ps(static_cast<const float*>(values) + index);
  const auto* address = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(values) + index);
  const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(address));
  const __m256 nan = _mm256_set1_ps(__builtin_nanf(""));
  if (type == Scale::kE4M3) {
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7F));
    const __m256i is_nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F));
    return _mm256_blendv_ps(FloatsFromFloatBytes<4>(_mm256_slli_epi32(bits, 24)), nan, _mm256_castsi256_ps(is_nan));
  }
  const __m256i is_smallest = _mm256_cmpeq_epi32(bits, _mm256_setzero_si256());
  const __m256i is_nan = _mm256_cmpeq_epi32(bits, _mm256_set1_epi32(255));
  const __m256i subnormal = _mm256_and_si256(is_smallest, _mm256_set1_epi32(0x00400000));  // 2^-127
  const __m256i powers = _mm256_or_si256(_mm256_slli_epi32(bits, 23), subnormal);
  return _mm256_blendv_ps(_mm256_castsi256_ps(powers), nan, _mm256_castsi256_ps(is_nan));
}

// Zero points of the eight columns of a col as [b][w], less what values have already subtracted; `first` is the col's
// first entry of the scales, whose order is [w][b].
template <class Math>
JMM_INLINE __m256 LoadExcess(const ExpertMatrix& weight, int64_t first) {
  __m256 zeros = _mm256_set1_ps(weight.zero_point);
  if (weight.zeros_type == Zeros::kFloat) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    zeros = _mm256_permutevar8x32_ps(LoadFloats(weight.zeros, weight.scale_type, first), order);
  } else if (weight.zeros_type == Zeros::kInteger) {
    const int32_t* words = static_cast<const int32_t*>(weight.zeros) + first * Math::kBits / 32;
    __m256i codes;
    if constexpr (Math::kBits == 4) {  // one word, nibbles [b][w]
      const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(*words), shifts), _mm256_set1_epi32(15));
    } else {  // two words [w / 2], bytes [b][w % 2]
      const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words));
      codes = _mm256_permutevar8x32_epi32(_mm256_cvtepu8_epi32(bytes), order);
    }
    zeros = _mm256_cvtepi32_ps(codes);
  }
  return _mm256_sub_ps(zeros, _mm256_set1_ps(Math::kCenter));
}

// The rows row ... row + R - 1 of a panel over `count` tiles of one group.
template <class Math, int R>
void AddRows(const Panel& panel, int row, int64_t group, int64_t first_tile, int count) {
  constexpr int64_t kTileWords = kTileK * kUnit * Math::kBits / 32;
  constexpr int kColWords = kTileWords / 8;
  const ExpertMatrix& weight = panel.weight;
  const bool has_excess = weight.zeros_type != Zeros::kNone || weight.zero_point != Math::kCenter;
  alignas(32) float x[kSegmentTiles * Math::kTileX * R];
  float sums[R];
  for (int r = 0; r < R; ++r) {
    const uint16_t* source = panel.x[row + r] + first_tile * kTileK;
    __m256 sum = _mm256_setzero_ps();
    for (int tile = 0; tile < count; ++tile) {
      Math::template Expand<R>(source + tile * kTileK, panel.x_type, x + tile * Math::kTileX * R, r, &sum);
    }
    sums[r] = SumOfLanes(sum);
  }

  const int64_t tile_stride = weight.n / kUnit * kTileWords;
  const int64_t out_stride = static_cast<int64_t>(panel.units) * kUnit;
  // As many cols at once as accumulators fit in the registers.
  constexpr int kColumns = R == 1 ? 4 : R == 2 ? 2 : 1;
  // Stored scales of a col are [w][b], sums are [b][w].
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  Lookahead lookahead(panel, first_tile, count);
  for (int i = 0; i < panel.units; ++i, lookahead.Advance()) {
    const int64_t column = panel.unit[i] * kUnit;
    const int32_t* tiles = weight.packed + first_tile * tile_stride + panel.unit[i] * kTileWords;
    const int64_t prefetch = lookahead.Words(tiles, kTileWords);
    lookahead.PrefetchScales(Math::kBits);
    for (int col = 0; col < 8; col += kColumns) {
      __m256 acc[kColumns][R][2];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[c][r][0] = acc[c][r][1] = _mm256_setzero_ps();
      }
      const int32_t* words = tiles + col * kColWords;
      const float* tile_x = x;
#pragma GCC unroll 1
      for (int tile = 0; tile < count; ++tile) {
#pragma GCC unroll 4
        for (int part = 0; part < Math::kParts; ++part) {
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) {
            const int32_t* col_words = words + c * kColWords;
            // Into the second level: tiles along k are often a multiple of 4 KiB apart, so that those in use
            // and those to come would evict each other from the first.
            if (part % 2 == 0) {
              _mm_prefetch(reinterpret_cast<const char*>(col_words + part * kLanes + prefetch), _MM_HINT_T1);
            }
            Math::template AddPart<R>(col_words, part, tile_x, acc[c]);
          }
        }
        words += tile_stride;
        tile_x += Math::kTileX * R;
      }
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const int64_t first = group * weight.n + column + 8 * (col + c);
        const __m256 scale = _mm256_permutevar8x32_ps(LoadFloats(weight.scales, weight.scale_type, first), order);
        const __m256 excess = has_excess ? LoadExcess<Math>(weight, first) : _mm256_setzero_ps();
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          __m256 dot = Math::SumColumn(acc[c][r]);
          if (has_excess) dot = _mm256_fnmadd_ps(excess, _mm256_set1_ps(sums[r]), dot);
          float* out = panel.out + (row + r) * out_stride + i * kUnit + 8 * (col + c);
          _mm256_storeu_ps(out, _mm256_fmadd_ps(scale, dot, _mm256_loadu_ps(out)));
        }
      }
    }
  }
}

// Brings a unit's sums, stored [col][b][w], into plain column order 16 * w + 8 * b + col.
JMM_INLINE void OrderColumns(float* out) {
  float plain[kUnit];
  for (int col = 0; col < 8; ++col) {
    for (int b = 0; b < 2; ++b) {
      for (int w = 0; w < 4; ++w) plain[16 * w + 8 * b + col] = out[8 * col + 4 * b + w];
    }
  }
  for (int i = 0; i < kUnit; ++i) out[i] = plain[i];
}

template <class Math>
void RunPanel(const Panel& panel) {
  const ExpertMatrix& weight = panel.weight;
  const int64_t group_tiles = weight.group_size / kTileK;
  const int64_t all_tiles = weight.k / kTileK;
  const int64_t blocks = static_cast<int64_t>(panel.rows) * panel.units;
  for (int64_t i = 0; i < blocks * kUnit; ++i) panel.out[i] = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const int64_t group_end = (group + 1) * group_tiles;
    const int64_t end = group_end < all_tiles ? group_end : all_tiles;
    for (int64_t first_tile = group * group_tiles; first_tile < end; first_tile += kSegmentTiles) {
      const int64_t left = end - first_tile;
      const int count = left < kSegmentTiles ? static_cast<int>(left) : kSegmentTiles;
      for (int row = 0; row < panel.rows; row += kMaxRows) {
        switch (panel.rows - row) {
          case 1:
            AddRows<Math, 1>(panel, row, group, first_tile, count);
            break;
          case 2:
            AddRows<Math, 2>(panel, row, group, first_tile, count);
            break;
          case 3:
            AddRows<Math, 3>(panel, row, group, first_tile, count);
            break;
          default:
            AddRows<Math, 4>(panel, row, group, first_tile, count);
            break;
        }
      }
    }
  }
  for (int64_t i = 0; i < blocks; ++i) OrderColumns(panel.out + i * kUnit);
}

}  // namespace

void Avx2Panel(const Panel& panel) {
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
