// The panel kernel for 512-bit registers, apart from the codes and the arithmetic, which `Math` brings.
//
// A packed line is 64 bytes of the words of one col of a unit: columns 16 * w + 8 * b + col. With 4-bit codes one line
// is a col, lanes [t = 0..3][w = 0..3], both halves b inside a word; with 8-bit codes two lines are, lanes
// [t % 2][w = 0..3][b = 0..1]; with 16-bit codes four, one for each t, lanes [w = 0..3][b = 0..1][half of k]. Lanes are
// multiplied by x expanded to the same order and accumulated apart; only at the end of a segment are the lanes of a
// column added and the scale applied.
//
// Math provides
//   kBits, kCenter                of a code: its width, and the zero point that its value has already subtracted
//   kVectors                      x vectors of one tile
//   kSegmentTiles                 most tiles between two applications of the scale
//   Expand(x, out, stride, sum)   expands a tile, its vectors `stride` apart; adds its elements to `sum`
//   kSumWeight                    how often `sum` holds each element
//   AddColumn<R>(words, x, acc)   acc[r] += the codes of a col of a tile times row r, in two accumulators
//   SumColumns(a, b)              the sums of two cols from their accumulators, lanes [c][b][w]
//
// Included by one file per instruction set, so everything has internal linkage: a shared template instance
// could be kept from the wrong file.
#ifndef JAX_MARLIN_MOE_CPU_AVX512_PANEL_H_
#define JAX_MARLIN_MOE_CPU_AVX512_PANEL_H_

#include <immintrin.h>

#include "cpu/gemm.h"
#include "cpu/lookahead.h"

// GCC's own definition of the "undefined" operand of its intrinsics sets these off (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define JMM_INLINE __attribute__((always_inline)) inline

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kLineWords = 16;     // words of a packed line
constexpr int kVectorFloats = 16;  // lanes of a register
constexpr int kMaxRows = 4;        // rows that share one dequantisation

// Sixteen 16-bit values as float32.
JMM_INLINE __m512 FloatsFromElements(__m256i bits, Element type) {
  if (type == Element::kF16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Sixteen consecutive ones.
JMM_INLINE __m512 LoadElements(const uint16_t* values, Element type) {
  return FloatsFromElements(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), type);
}

// Floats of 8 bits in the top byte of each lane, anything below. Sign and magnitude, moved to where a float32 has them,
// make the value times 2^(bias - 127): of subnormal codes a subnormal, which this thread keeps (float_mode.h).
// Processors are slow at those, but of weights scaled to the range of e4m3 one in ten thousand is so small.
template <int kExponentBits>
JMM_INLINE __m512 FloatsFromFloatBytes(__m512i top) {
  constexpr int kDown = 8 - kExponentBits, kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr int kPlaces = static_cast<int>(0x80000000u | 0x7Fu << (24 - kDown));
  constexpr float kScale = 0x1p127f / (1u << kBias);
  const __m512i bits = _mm512_and_si512(_mm512_srai_epi32(top, kDown), _mm512_set1_epi32(kPlaces));
  return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(kScale));
}

// The floats of type `type` of a column pair, stored from entry `index` on as [c][w][b], as float32 in lanes [c][b][w].
// They are brought into order while they are narrow.
template <Scale type>
JMM_INLINE __m512 LoadPair(const void* values, int64_t index) {
  if constexpr (type == Scale::kF32) {
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    return _mm512_permutexvar_ps(order, _mm512_loadu_ps(static_cast<const float*>(values) + index));
  } else if constexpr (type == Scale::kBf16 || type == Scale::kF16) {
    const __m256i order = _mm256_setr_epi16(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const auto* address = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(values) + index);
    const __m256i bits = _mm256_permutexvar_epi16(order, _mm256_loadu_si256(address));
    return FloatsFromElements(bits, type == Scale::kBf16 ? Element::kBf16 : Element::kF16);
  } else {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    const auto* address = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(values) + index);
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(address), order);
    const __m512 nan = _mm512_set1_ps(__builtin_nanf(""));
    if constexpr (type == Scale::kE4M3) {
      const __m128i magnitude_bits = _mm_set1_epi8(0x7F);
      const __mmask16 is_nan = _mm_cmpeq_epi8_mask(_mm_and_si128(bytes, magnitude_bits), magnitude_bits);
      const __m512 floats = FloatsFromFloatBytes<4>(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 24));
      return _mm512_mask_mov_ps(floats, is_nan, nan);
    } else {
      const __mmask16 is_smallest = _mm_testn_epi8_mask(bytes, bytes);
      const __mmask16 is_nan = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(-1));
      const __m512i powers = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
      const __m512i all = _mm512_mask_mov_epi32(powers, is_smallest, _mm512_set1_epi32(0x00400000));  // 2^-127
      return _mm512_mask_mov_ps(_mm512_castsi512_ps(all), is_nan, nan);
    }
  }
}

// A group of one unit as the four vectors of column pairs: lanes [c][b][w] of vector p are column
// 16 * w + 8 * b + 2 * p + c.
struct GroupScales {
  __m512 scale[4];
  __m512 excess[4];  // of the zero point over what values have already subtracted
};

// Integer zero points of one column pair: codes as int32.
template <int kBits>
JMM_INLINE __m512i LoadZeroCodes(const int32_t* words) {
  if constexpr (kBits == 4) {  // two words, one a col; codes at nibbles [b][w]
    const __m512i both = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(words)));
    const __m512i owner = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_permutexvar_epi32(owner, both), shifts), _mm512_set1_epi32(15));
  } else {  // four words [c][w / 2], codes at bytes [b][w % 2]
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
    const __m512i order = _mm512_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm512_permutexvar_epi32(order, codes);
  }
}

template <class Math, Scale type>
JMM_INLINE void LoadTypedScales(const ExpertMatrix& weight, int64_t first, GroupScales* out) {
  const __m512 center = _mm512_set1_ps(Math::kCenter);
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    out->scale[p] = LoadPair<type>(weight.scales, first + 16 * p);
  }
  if (weight.zeros_type == Zeros::kInteger) {
    const int32_t* words = static_cast<const int32_t*>(weight.zeros) + first * Math::kBits / 32;
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      const __m512i codes = LoadZeroCodes<Math::kBits>(words + p * Math::kBits / 2);
      out->excess[p] = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), center);
    }
  } else if (weight.zeros_type == Zeros::kFloat) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      out->excess[p] = _mm512_sub_ps(LoadPair<type>(weight.zeros, first + 16 * p), center);
    }
  } else {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) out->excess[p] = _mm512_sub_ps(_mm512_set1_ps(weight.zero_point), center);
  }
}

// Scales and zero points of a group for the 64 columns from `column` on.
template <class Math>
JMM_INLINE void LoadScales(const ExpertMatrix& weight, int64_t group, int64_t column, GroupScales* out) {
  const int64_t first = group * weight.n + column;
  switch (weight.scale_type) {
    case Scale::kBf16:
      return LoadTypedScales<Math, Scale::kBf16>(weight, first, out);
    case Scale::kF16:
      return LoadTypedScales<Math, Scale::kF16>(weight, first, out);
    case Scale::kF32:
      return LoadTypedScales<Math, Scale::kF32>(weight, first, out);
    case Scale::kE4M3:
      return LoadTypedScales<Math, Scale::kE4M3>(weight, first, out);
    case Scale::kE8M0:
      return LoadTypedScales<Math, Scale::kE8M0>(weight, first, out);
  }
}

// Whether values need more than their center subtracted.
template <class Math>
bool HasExcess(const ExpertMatrix& weight) {
  return weight.zeros_type != Zeros::kNone || weight.zero_point != Math::kCenter;
}

// The sums of the 128-bit lanes of four accumulators: of 4-bit codes, over t.
JMM_INLINE __m512 SumLanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
}

// One segment (tiles of one group) of one unit for R rows.
struct Segment {
  const int32_t* tiles;  // first tile
  int64_t tile_stride;   // words from a tile to the next one along k
  int count;             // tiles
  int64_t prefetch;      // words from a tile to the one that should come from memory next
  const float* x;        // [count, Math::kVectors, R] vectors
  const float* sums;     // [R] sums of x
  float* out;            // [R rows `out_stride` apart][4 column pairs] vectors
  int64_t out_stride;
};

template <class Math, int R>
JMM_INLINE void AddSegment(const Segment& segment, const GroupScales& scales, bool has_excess) {
  constexpr int kColWords = 8 * kTileK * Math::kBits / 32;  // of one col: 8 columns
  // As many cols at once as accumulators fit in the registers.
  constexpr int kColumns = R == 1 ? 8 : R == 2 ? 4 : 2;
#pragma GCC unroll 1
  for (int col = 0; col < 8; col += kColumns) {
    __m512 acc[kColumns][R][2];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[c][r][0] = acc[c][r][1] = _mm512_setzero_ps();
    }
    const int32_t* words = segment.tiles + col * kColWords;
    const float* x = segment.x;
#pragma GCC unroll 1
    for (int tile = 0; tile < segment.count; ++tile) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        // Into the second level: tiles along k are often a multiple of 4 KiB apart, so that those in use and
        // those to come would evict each other from the first.
#pragma GCC unroll 2
        for (int line = 0; line < kColWords; line += kLineWords) {
          const int32_t* next = words + segment.prefetch + c * kColWords + line;
          _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
        }
        Math::template AddColumn<R>(words + c * kColWords, x, acc[c]);
      }
      words += segment.tile_stride;
      x += Math::kVectors * R * kVectorFloats;
    }
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c += 2) {
      const int p = (col + c) / 2;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m512 dot = Math::SumColumns(acc[c][r], acc[c + 1][r]);
        if (has_excess) dot = _mm512_fnmadd_ps(scales.excess[p], _mm512_set1_ps(segment.sums[r]), dot);
        float* out = segment.out + r * segment.out_stride + p * kVectorFloats;
        _mm512_storeu_ps(out, _mm512_fmadd_ps(scales.scale[p], dot, _mm512_loadu_ps(out)));
      }
    }
  }
}

// The rows row ... row + R - 1 of a panel over one segment.
template <class Math, int R>
void AddRows(const Panel& panel, int row, int64_t group, int64_t first_tile, int count) {
  constexpr int64_t kTileWords = kTileK * kUnit * Math::kBits / 32;
  const ExpertMatrix& weight = panel.weight;
  const bool has_excess = HasExcess<Math>(weight);
  alignas(64) float x[Math::kSegmentTiles * Math::kVectors * R * kVectorFloats];
  float sums[R] = {};
  for (int r = 0; r < R; ++r) {
    const uint16_t* source = panel.x[row + r] + first_tile * kTileK;
    __m512 sum = _mm512_setzero_ps();
    for (int tile = 0; tile < count; ++tile) {
      float* out = x + (tile * Math::kVectors * R + r) * kVectorFloats;
      Math::Expand(source + tile * kTileK, panel.x_type, out, R * kVectorFloats, &sum);
    }
    if (has_excess) sums[r] = _mm512_reduce_add_ps(sum) * (1.0f / Math::kSumWeight);
  }

  Segment segment;
  segment.tile_stride = weight.n / kUnit * kTileWords;
  segment.count = count;
  segment.x = x;
  segment.sums = sums;
  segment.out_stride = static_cast<int64_t>(panel.units) * kUnit;
  segment.out = panel.out + row * segment.out_stride;
  Lookahead lookahead(panel, first_tile, count);
  for (int i = 0; i < panel.units; ++i, lookahead.Advance()) {
    segment.tiles = weight.packed + first_tile * segment.tile_stride + panel.unit[i] * kTileWords;
    segment.prefetch = lookahead.Words(segment.tiles, kTileWords);
    lookahead.PrefetchScales(Math::kBits);
    GroupScales scales;
    LoadScales<Math>(weight, group, panel.unit[i] * kUnit, &scales);
    AddSegment<Math, R>(segment, scales, has_excess);
    segment.out += kUnit;
  }
}

// Brings the vectors of column pairs of one unit into plain column order.
JMM_INLINE void OrderColumns(float* out) {
  const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24, 4, 12, 20, 28, 4, 12, 20, 28);
  const __m512 pair0 = _mm512_loadu_ps(out), pair1 = _mm512_loadu_ps(out + 16);
  const __m512 pair2 = _mm512_loadu_ps(out + 32), pair3 = _mm512_loadu_ps(out + 48);
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    const __m512i index = _mm512_add_epi32(first, _mm512_set1_epi32(w));
    const __m512 low = _mm512_permutex2var_ps(pair0, index, pair1);
    const __m512 high = _mm512_permutex2var_ps(pair2, index, pair3);
    _mm512_storeu_ps(out + 16 * w, _mm512_mask_blend_ps(0xF0F0, low, high));
  }
}

template <class Math>
void RunPanel(const Panel& panel) {
  const ExpertMatrix& weight = panel.weight;
  const int64_t group_tiles = weight.group_size / kTileK;
  const int64_t all_tiles = weight.k / kTileK;
  const int64_t blocks = static_cast<int64_t>(panel.rows) * panel.units;
  for (int64_t i = 0; i < blocks * 4; ++i) _mm512_storeu_ps(panel.out + 16 * i, _mm512_setzero_ps());
  for (int64_t group = 0; group < weight.groups; ++group) {
    const int64_t group_end = (group + 1) * group_tiles;
    const int64_t end = group_end < all_tiles ? group_end : all_tiles;
    for (int64_t first_tile = group * group_tiles; first_tile < end; first_tile += Math::kSegmentTiles) {
      const int64_t left = end - first_tile;
      const int count = left < Math::kSegmentTiles ? static_cast<int>(left) : Math::kSegmentTiles;
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
}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_AVX512_PANEL_H_
