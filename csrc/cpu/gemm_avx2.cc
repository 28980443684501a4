// The panel kernel for AVX2, FMA and F16C: float32 products of exactly converted operands.
//
// A code is masked where it stands in its word and converted as it is, 2^shift times too large. The power of
// two is taken back exactly: from x for the four k of a word, from the sum for the half b, 8 bits higher.
// Zero points are subtracted from the sum, so an infinite x gives NaN where other kernels may give infinity.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/gemm.h"

#define JMM_INLINE __attribute__((always_inline)) inline

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kSegmentTiles = 16;   // most tiles between two applications of the scale
constexpr int kLineWords = 16;      // words of one col of a chunk: lanes [t = 0..3][w = 0..3]
constexpr int kPrefetchTiles = 16;  // how far ahead memory is asked for
constexpr int kLanes = 8;
constexpr int kMaxRows = 4;  // rows that share one dequantisation

// x of half a line (two t): for k = 2t, 2t + 1, 2t + 8, 2t + 9 divided by 2^0, 2^16, 2^4, 2^20; then the last
// times 2^8, for the codes at bit 28: they are shifted down, as in place they could convert to a negative.
constexpr int kVectors = 5;
constexpr int kHalves = 2;

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

// Expands one tile of a row, its vectors `stride` apart: [half][kVectors].
JMM_INLINE void Expand(const uint16_t* x, Element type, float* out, int stride, __m256* sum) {
  const __m256 low = LoadElements(x, type);
  const __m256 high = LoadElements(x + 8, type);
  const __m256i even = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
  *sum = _mm256_add_ps(*sum, _mm256_add_ps(low, high));
#pragma GCC unroll 2
  for (int half = 0; half < kHalves; ++half) {
    const __m256i index0 = _mm256_add_epi32(even, _mm256_set1_epi32(4 * half));
    const __m256i index1 = _mm256_add_epi32(even, _mm256_set1_epi32(4 * half + 1));
    const __m256 last = _mm256_permutevar8x32_ps(high, index1);
    float* vectors = out + half * kVectors * stride;
    _mm256_store_ps(vectors, _mm256_permutevar8x32_ps(low, index0));
    _mm256_store_ps(vectors + stride, _mm256_mul_ps(_mm256_permutevar8x32_ps(low, index1), _mm256_set1_ps(0x1p-16f)));
    _mm256_store_ps(vectors + 2 * stride,
                    _mm256_mul_ps(_mm256_permutevar8x32_ps(high, index0), _mm256_set1_ps(0x1p-4f)));
    _mm256_store_ps(vectors + 3 * stride, _mm256_mul_ps(last, _mm256_set1_ps(0x1p-20f)));
    _mm256_store_ps(vectors + 4 * stride, _mm256_mul_ps(last, _mm256_set1_ps(0x1p8f)));
  }
}

// acc[r][b] += codes of half b of half a line, times 2^(8 * b), times row r.
template <int R>
JMM_INLINE void AddHalfLine(const int32_t* words, const float* x, __m256 (&acc)[R][2]) {
  const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const int shift[4] = {0, 16, 4, 20};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      const bool top = j == 3 && b == 1;
      const __m256i code = top ? _mm256_srli_epi32(line, 28)
                               : _mm256_and_si256(line, _mm256_set1_epi32(top ? 0 : 15 << (shift[j] + 8 * b)));
      const __m256 value = _mm256_cvtepi32_ps(code);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        acc[r][b] = _mm256_fmadd_ps(value, _mm256_load_ps(x + ((j + top) * R + r) * kLanes), acc[r][b]);
      }
    }
  }
}

// The rows row ... row + R - 1 of a panel over `count` tiles of one group.
template <int R>
void AddRows(const Panel& panel, int row, int64_t group, int64_t first_tile, int count, bool last) {
  alignas(32) float x[kSegmentTiles * kHalves * kVectors * R * kLanes];
  float sums[R];
  for (int r = 0; r < R; ++r) {
    const uint16_t* source = panel.x[row + r] + first_tile * kTileK;
    __m256 sum = _mm256_setzero_ps();
    for (int tile = 0; tile < count; ++tile) {
      float* out = x + (tile * kHalves * kVectors * R + r) * kLanes;
      Expand(source + tile * kTileK, panel.x_type, out, R * kLanes, &sum);
    }
    sums[r] = SumOfLanes(sum);
  }

  const ExpertMatrix& weight = panel.weight;
  const int64_t tile_stride = weight.n * 2;
  const int64_t out_stride = static_cast<int64_t>(panel.chunks) * kChunk;
  // As many columns at once as accumulators fit in the registers.
  constexpr int kColumns = R == 1 ? 4 : R == 2 ? 2 : 1;
  // Stored scales of a col are [w][b], sums are [b][w].
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256 place = _mm256_setr_ps(1, 1, 1, 1, 0x1p-8f, 0x1p-8f, 0x1p-8f, 0x1p-8f);
  int ahead = (kPrefetchTiles + count - 1) / count;
  if (ahead > panel.chunks) ahead = panel.chunks;
  for (int i = 0; i < panel.chunks; ++i) {
    const int64_t column = panel.chunk[i] * kChunk;
    const int32_t* tiles = weight.packed + first_tile * tile_stride + panel.chunk[i] * kTileWords;
    int64_t prefetch = 0;  // words from a tile to the one that should come from memory next
    if (i + ahead < panel.chunks) {
      prefetch = (panel.chunk[i + ahead] - panel.chunk[i]) * kTileWords;
    } else if (!last) {
      const int64_t next = panel.chunk[i + ahead - panel.chunks];
      prefetch = (next - panel.chunk[i]) * kTileWords + count * tile_stride;
    }
    for (int col = 0; col < 8; col += kColumns) {
      __m256 acc[kColumns][R][2];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[c][r][0] = acc[c][r][1] = _mm256_setzero_ps();
      }
      const int32_t* line = tiles + col * kLineWords;
      const float* vectors = x;
#pragma GCC unroll 1
      for (int tile = 0; tile < count; ++tile) {
#pragma GCC unroll 2
        for (int half = 0; half < kHalves; ++half) {
#pragma GCC unroll 4
          for (int c = 0; c < kColumns; ++c) {
            const int32_t* words = line + c * kLineWords + half * kLanes;
            // Into the second level: tiles along k are often a multiple of 4 KiB apart, so that those in use
            // and those to come would evict each other from the first.
            if (half == 0) _mm_prefetch(reinterpret_cast<const char*>(words + prefetch), _MM_HINT_T1);
            AddHalfLine<R>(words, vectors, acc[c]);
          }
          vectors += kVectors * R * kLanes;
        }
        line += tile_stride;
      }
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const int64_t position = column + 8 * (col + c);
        const __m256 scale = _mm256_permutevar8x32_ps(
            LoadElements(weight.scales + group * weight.n + position, weight.scale_type), order);
        __m256 zero = _mm256_set1_ps(8);
        if (weight.zeros != nullptr) {
          const int32_t word = weight.zeros[(group * weight.n + position) / 8];
          const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
          zero = _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15)));
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m256 sum = _mm256_add_ps(_mm256_permute2f128_ps(acc[c][r][0], acc[c][r][1], 0x20),
                                           _mm256_permute2f128_ps(acc[c][r][0], acc[c][r][1], 0x31));
          const __m256 offset = _mm256_mul_ps(zero, _mm256_set1_ps(sums[r]));
          const __m256 dot = _mm256_fmsub_ps(sum, place, offset);
          float* out = panel.out + (row + r) * out_stride + i * kChunk + 8 * (col + c);
          _mm256_storeu_ps(out, _mm256_fmadd_ps(scale, dot, _mm256_loadu_ps(out)));
        }
      }
    }
  }
}

// Brings a chunk's sums, stored [col][b][w], into plain column order 16 * w + 8 * b + col.
JMM_INLINE void OrderColumns(float* out) {
  float plain[kChunk];
  for (int col = 0; col < 8; ++col) {
    for (int b = 0; b < 2; ++b) {
      for (int w = 0; w < 4; ++w) plain[16 * w + 8 * b + col] = out[8 * col + 4 * b + w];
    }
  }
  for (int i = 0; i < kChunk; ++i) out[i] = plain[i];
}

}  // namespace

void Avx2Panel(const Panel& panel) {
  const ExpertMatrix& weight = panel.weight;
  const int64_t group_tiles = weight.k / weight.groups / kTileK;
  const int64_t blocks = static_cast<int64_t>(panel.rows) * panel.chunks;
  for (int64_t i = 0; i < blocks * kChunk; ++i) panel.out[i] = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    for (int64_t done = 0; done < group_tiles; done += kSegmentTiles) {
      const int64_t first_tile = group * group_tiles + done;
      const int64_t left = group_tiles - done;
      const int count = left < kSegmentTiles ? static_cast<int>(left) : kSegmentTiles;
      const bool last = (first_tile + count) * kTileK >= weight.k;
      for (int row = 0; row < panel.rows; row += kMaxRows) {
        switch (panel.rows - row) {
          case 1:
            AddRows<1>(panel, row, group, first_tile, count, last);
            break;
          case 2:
            AddRows<2>(panel, row, group, first_tile, count, last);
            break;
          case 3:
            AddRows<3>(panel, row, group, first_tile, count, last);
            break;
          default:
            AddRows<4>(panel, row, group, first_tile, count, last);
            break;
        }
      }
    }
  }
  for (int64_t i = 0; i < blocks; ++i) OrderColumns(panel.out + i * kChunk);
}

}  // namespace jax_marlin_moe::cpu

#endif  // defined(__x86_64__)
