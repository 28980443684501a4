// The panel kernel for 512-bit registers, apart from the arithmetic of one packed line, which `Math` brings.
//
// A packed line is 64 bytes: the words of columns 16 * w + 8 * b + col of a chunk for one col, as lanes
// [t = 0..3][w = 0..3], with both halves b inside a word. Lanes are multiplied by x expanded to the same
// order and accumulated apart; only at the end of a segment are the four t added and the scale applied.
//
// Math provides
//   kVectors                      x vectors of one tile
//   Expand(x, out, stride, sum)   expands a tile, its vectors `stride` apart; adds its elements to `sum`
//   kSumWeight                    how often `sum` holds each element
//   AddLine<R>(line, x, acc)      acc[r][b] += codes of half b, minus 8, times row r
//
// Included by one file per instruction set, so everything has internal linkage: a shared template instance
// could be kept from the wrong file.
#ifndef JAX_MARLIN_MOE_CPU_AVX512_PANEL_H_
#define JAX_MARLIN_MOE_CPU_AVX512_PANEL_H_

#include <immintrin.h>

#include "cpu/gemm.h"

// GCC's own definition of the "undefined" operand of its intrinsics sets these off (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define JMM_INLINE __attribute__((always_inline)) inline

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kSegmentTiles = 16;   // most tiles between two applications of the scale
constexpr int kLineWords = 16;      // words of a packed line
constexpr int kPrefetchTiles = 16;  // how far ahead memory is asked for
constexpr int kVectorFloats = 16;   // lanes of a register
constexpr int kMaxRows = 4;         // rows that share one dequantisation

// Sixteen consecutive 16-bit values as float32.
JMM_INLINE __m512 LoadElements(const uint16_t* values, Element type) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  if (type == Element::kF16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// A segment of one chunk as the four vectors of column pairs: lanes [c][b][w] of vector p stand for column
// 16 * w + 8 * b + 2 * p + c.
struct SegmentScales {
  __m512 scale[4];
  __m512 excess[4];  // of the zero point over 8, which the codes have already subtracted
};

JMM_INLINE void LoadScales(const ExpertMatrix& weight, int64_t group, int64_t column, SegmentScales* out) {
  // The stored order is [c][w][b].
  const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const uint16_t* scales = weight.scales + group * weight.n + column;
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    out->scale[p] = _mm512_permutexvar_ps(order, LoadElements(scales + 16 * p, weight.scale_type));
  }
  if (weight.zeros == nullptr) return;
  const int32_t* zeros = weight.zeros + (group * weight.n + column) / 8;
  const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(zeros)));
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i owner = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    const __m512i word = _mm512_permutexvar_epi32(_mm512_add_epi32(owner, _mm512_set1_epi32(2 * p)), words);
    const __m512i code = _mm512_and_si512(_mm512_srlv_epi32(word, shifts), _mm512_set1_epi32(15));
    out->excess[p] = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(8)));
  }
}

// The sums over t of four accumulators, one in each 128-bit lane.
JMM_INLINE __m512 SumOverT(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
}

// One segment (tiles of one group) of one chunk for R rows.
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
JMM_INLINE void AddSegment(const Segment& segment, const SegmentScales& scales, bool has_zeros) {
  // As many columns at once as accumulators fit in the registers.
  constexpr int kColumns = R == 1 ? 8 : R == 2 ? 4 : 2;
#pragma GCC unroll 1
  for (int col = 0; col < 8; col += kColumns) {
    __m512 acc[kColumns][R][2];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[c][r][0] = acc[c][r][1] = _mm512_setzero_ps();
    }
    const int32_t* line = segment.tiles + col * kLineWords;
    const float* x = segment.x;
#pragma GCC unroll 1
    for (int tile = 0; tile < segment.count; ++tile) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        // Into the second level: tiles along k are often a multiple of 4 KiB apart, so that those in use and
        // those to come would evict each other from the first.
        _mm_prefetch(reinterpret_cast<const char*>(line + segment.prefetch + c * kLineWords), _MM_HINT_T1);
        Math::template AddLine<R>(line + c * kLineWords, x, acc[c]);
      }
      line += segment.tile_stride;
      x += Math::kVectors * R * kVectorFloats;
    }
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c += 2) {
      const int p = (col + c) / 2;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m512 dot = SumOverT(acc[c][r][0], acc[c][r][1], acc[c + 1][r][0], acc[c + 1][r][1]);
        if (has_zeros) dot = _mm512_fnmadd_ps(scales.excess[p], _mm512_set1_ps(segment.sums[r]), dot);
        float* out = segment.out + r * segment.out_stride + p * kVectorFloats;
        _mm512_storeu_ps(out, _mm512_fmadd_ps(scales.scale[p], dot, _mm512_loadu_ps(out)));
      }
    }
  }
}

// The rows row ... row + R - 1 of a panel over one segment.
template <class Math, int R>
void AddRows(const Panel& panel, int row, int64_t group, int64_t first_tile, int count, bool last) {
  alignas(64) float x[kSegmentTiles * Math::kVectors * R * kVectorFloats];
  float sums[R];
  for (int r = 0; r < R; ++r) {
    const uint16_t* source = panel.x[row + r] + first_tile * kTileK;
    __m512 sum = _mm512_setzero_ps();
    for (int tile = 0; tile < count; ++tile) {
      float* out = x + (tile * Math::kVectors * R + r) * kVectorFloats;
      Math::Expand(source + tile * kTileK, panel.x_type, out, R * kVectorFloats, &sum);
    }
    sums[r] = _mm512_reduce_add_ps(sum) * (1.0f / Math::kSumWeight);
  }

  const ExpertMatrix& weight = panel.weight;
  Segment segment;
  segment.tile_stride = weight.n * 2;
  segment.count = count;
  segment.x = x;
  segment.sums = sums;
  segment.out_stride = static_cast<int64_t>(panel.chunks) * kChunk;
  segment.out = panel.out + row * segment.out_stride;
  int ahead = (kPrefetchTiles + count - 1) / count;
  if (ahead > panel.chunks) ahead = panel.chunks;
  for (int i = 0; i < panel.chunks; ++i) {
    segment.tiles = weight.packed + first_tile * segment.tile_stride + panel.chunk[i] * kTileWords;
    if (i + ahead < panel.chunks) {
      segment.prefetch = (panel.chunk[i + ahead] - panel.chunk[i]) * kTileWords;
    } else if (!last) {
      const int64_t next = panel.chunk[i + ahead - panel.chunks];
      segment.prefetch = (next - panel.chunk[i]) * kTileWords + count * segment.tile_stride;
    } else {
      segment.prefetch = 0;
    }
    SegmentScales scales;
    LoadScales(weight, group, panel.chunk[i] * kChunk, &scales);
    AddSegment<Math, R>(segment, scales, weight.zeros != nullptr);
    segment.out += kChunk;
  }
}

// Brings the vectors of column pairs of one chunk into plain column order.
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
  const int64_t group_tiles = weight.k / weight.groups / kTileK;
  const int64_t blocks = static_cast<int64_t>(panel.rows) * panel.chunks;
  for (int64_t i = 0; i < blocks * 4; ++i) _mm512_storeu_ps(panel.out + 16 * i, _mm512_setzero_ps());
  for (int64_t group = 0; group < weight.groups; ++group) {
    for (int64_t done = 0; done < group_tiles; done += kSegmentTiles) {
      const int64_t first_tile = group * group_tiles + done;
      const int64_t left = group_tiles - done;
      const int count = left < kSegmentTiles ? static_cast<int>(left) : kSegmentTiles;
      const bool last = (first_tile + count) * kTileK >= weight.k;
      for (int row = 0; row < panel.rows; row += kMaxRows) {
        switch (panel.rows - row) {
          case 1:
            AddRows<Math, 1>(panel, row, group, first_tile, count, last);
            break;
          case 2:
            AddRows<Math, 2>(panel, row, group, first_tile, count, last);
            break;
          case 3:
            AddRows<Math, 3>(panel, row, group, first_tile, count, last);
            break;
          default:
            AddRows<Math, 4>(panel, row, group, first_tile, count, last);
            break;
        }
      }
    }
  }
  for (int64_t i = 0; i < blocks; ++i) OrderColumns(panel.out + i * kChunk);
}

}  // namespace
}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_AVX512_PANEL_H_
