// The transposed kernel. Its vectors are consecutive words of a packed line, which the compiler of the file that
// includes this one puts into the registers of its instruction set.
//
// A line has the words of one col of a unit, those of one t after those of another: 4-bit codes [t][w], with columns
// 16 * w + 8 * b + col for both b in a word; 8-bit ones [t][w][b]; 16-bit ones [t][w][b][half of k]. Lanes are
// multiplied by x, which depends on w and b, and accumulated apart through all units of a segment; at the end the
// lanes of a row of W are added.
//
// Everything has internal linkage: a shared template instance could be kept from the wrong file.
#ifndef JAX_MARLIN_MOE_CPU_TRANSPOSED_SEGMENT_H_
#define JAX_MARLIN_MOE_CPU_TRANSPOSED_SEGMENT_H_

#include "cpu/transposed.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jax_marlin_moe::cpu {
namespace {

#if defined(JMM_TRANSPOSED_LANES)  // of tests
constexpr int kLanes = JMM_TRANSPOSED_LANES;
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kSharers = 4;               // rows that share one dequantisation
constexpr int kOffset[4] = {0, 1, 8, 9};  // code j of a column in the words of one t has k = 2t + kOffset[j]

// Vectors of a compiler's own: registers of the instruction set, or as many as it takes.
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of this file alone
#endif
#define JMM_INLINE __attribute__((always_inline)) inline

JMM_INLINE Floats AsFloats(Words bits) { return reinterpret_cast<Floats>(bits); }
JMM_INLINE Floats Converted(Words bits) { return __builtin_convertvector(reinterpret_cast<Integers>(bits), Floats); }

// How wide codes lie in words:
//   kBits
//   kHalves         values of b in one word
//   kCodes          codes of one b in it: j, or j % 2 where words have half of k
//   Column(lane)    of words of one t: which x of a col, b aside
//   Row(lane, c)    j of code c
struct Nibbles {
  static constexpr int kBits = 4, kHalves = 2, kCodes = 4;
  static constexpr int Column(int lane) { return 2 * lane; }
  static constexpr int Row(int, int c) { return c; }
};
struct Bytes {
  static constexpr int kBits = 8, kHalves = 1, kCodes = 4;
  static constexpr int Column(int lane) { return lane; }
  static constexpr int Row(int, int c) { return c; }
};
struct Halfwords {
  static constexpr int kBits = 16, kHalves = 1, kCodes = 2;
  static constexpr int Column(int lane) { return lane / 2; }
  static constexpr int Row(int lane, int c) { return lane % 2 * 2 + c; }
};

// What a code of words means, less its center, and what sums of it are to be multiplied with. `Ready` is applied to
// words of half b before.

// Masked and converted where they stand.
struct Int4 : Nibbles {
  static constexpr int Shift(int c) { return c % 2 * 16 + c / 2 * 4; }
  static constexpr float Factor(int c) { return 1.0f / static_cast<float>(1u << Shift(c)); }
  static JMM_INLINE Words Ready(Words words, int b) { return b == 0 ? words : words >> 8; }
  static JMM_INLINE Floats Value(Words words, int c) { return Converted(words & (15u << Shift(c))); }
};
// Sign and magnitude where a float32 has them, times what its exponent is too wide by.
struct E2M1 : Nibbles {
  static constexpr float Factor(int) { return 1; }
  static JMM_INLINE Words Ready(Words words, int b) { return b == 0 ? words : words >> 8; }
  static JMM_INLINE Floats Value(Words words, int c) {
    constexpr int kPlaces = static_cast<int>(0x80000000u | 7u << 22);
    const Words top = words << (28 - Int4::Shift(c));
    return AsFloats(reinterpret_cast<Words>((reinterpret_cast<Integers>(top) >> 6) & kPlaces)) * 0x1p126f;
  }
};
struct Int8 : Bytes {
  static constexpr float Factor(int) { return 1; }
  // Flipping the top bit makes q - 128 in two's complement.
  static JMM_INLINE Words Ready(Words words, int) { return words ^ 0x80808080u; }
  static JMM_INLINE Floats Value(Words words, int c) {
    const Words top = words << (24 - (c % 2 * 16 + c / 2 * 8));
    return __builtin_convertvector(reinterpret_cast<Integers>(top) >> 24, Floats);
  }
};
template <int kExponentBits>
struct FloatByte : Bytes {
  static constexpr float Factor(int) { return 1; }
  static JMM_INLINE Words Ready(Words words, int) { return words; }
  static JMM_INLINE Floats Value(Words words, int c) {
    constexpr float kScale = 0x1p127f / (1u << ((1 << (kExponentBits - 1)) - 1));
    constexpr int kDown = 8 - kExponentBits;
    constexpr int kPlaces = static_cast<int>(0x80000000u | 0x7Fu << (24 - kDown));
    const Words top = words << (24 - (c % 2 * 16 + c / 2 * 8));
    return AsFloats(reinterpret_cast<Words>((reinterpret_cast<Integers>(top) >> kDown) & kPlaces)) * kScale;
  }
};
struct Bf16 : Halfwords {
  static constexpr float Factor(int) { return 1; }
  static JMM_INLINE Words Ready(Words words, int) { return words; }
  static JMM_INLINE Floats Value(Words words, int c) { return AsFloats(c == 0 ? words << 16 : words & 0xFFFF0000u); }
};
struct Fp16 : Halfwords {
  static constexpr float Factor(int) { return 1; }
  static JMM_INLINE Words Ready(Words words, int) { return words; }
  static JMM_INLINE Floats Value(Words words, int c) {
    const Words code = c == 0 ? words & 0xFFFF : words >> 16;
    const Words sign = (code & 0x8000) << 16, magnitude = (code & 0x7FFF) << 13;
    // What a comparison is true for has all bits set: the exponent of infinities and NaN.
    const Words special = reinterpret_cast<Words>((code & 0x7C00) == 0x7C00) & 0x7F800000;
    return AsFloats(reinterpret_cast<Words>(AsFloats(sign | magnitude) * 0x1p112f) | special);
  }
};

// How lines of a type are cut into vectors. A part is what has sums of its own: vectors of one t, or one of several t.
template <class Type>
struct Cut {
  static constexpr int kWordsOfT = Type::kBits;                                 // 4, 8 or 16
  static constexpr int kVectors = kWordsOfT > kLanes ? kWordsOfT / kLanes : 1;  // of a part
  static constexpr int kPartWords = kVectors * kLanes;
  static constexpr int kLineWords = 4 * kWordsOfT;
  static constexpr int kParts = kLineWords / kPartWords;
  static constexpr int kColX = kVectors * Type::kHalves;  // vectors of x of a col
  static constexpr int kUnitX = 8 * kColX;
};

// Of the eight floats of a col, those of these columns.
JMM_INLINE Floats Gathered(const float* eight, Integers column) {
#if defined(__AVX512F__) && !defined(JMM_TRANSPOSED_LANES)
  const __m512 values = _mm512_castps256_ps512(_mm256_loadu_ps(eight));
  return reinterpret_cast<Floats>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(column), values));
#elif defined(__AVX2__) && !defined(JMM_TRANSPOSED_LANES)
  const __m256 values = _mm256_loadu_ps(eight);
  return reinterpret_cast<Floats>(_mm256_permutevar8x32_ps(values, reinterpret_cast<__m256i>(column)));
#else
  Floats lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = eight[column[lane]];
  return lanes;
#endif
}

// x as lanes take it: unit after unit, each [col][vector of a part][b], then rows.
template <class Type, int R>
JMM_INLINE void Expand(const TransposedSegment& segment, int row, Floats* out) {
  using C = Cut<Type>;
  for (int r = 0; r < R; ++r) {
    const float* source = segment.x + static_cast<int64_t>(row + r) * segment.units * kUnit;
    for (int col = 0; col < 8 * segment.units; ++col, source += 8) {
#pragma GCC unroll 4
      for (int v = 0; v < C::kVectors; ++v) {
#pragma GCC unroll 2
        for (int b = 0; b < Type::kHalves; ++b) {
          Floats& lanes = out[((col * C::kVectors + v) * Type::kHalves + b) * R + r];
          Integers column;
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes; ++lane) {
            column[lane] = Type::Column((v * kLanes + lane) % C::kWordsOfT) + b;
          }
          lanes = Gathered(source, column);
        }
      }
    }
  }
}

// Adds the lanes of code c of a part to the rows of W that they are of.
template <class Type>
JMM_INLINE void AddLanes(Floats sums, int part, int c, float* out) {
  using C = Cut<Type>;
  constexpr int kOfT = C::kWordsOfT < kLanes ? C::kWordsOfT : kLanes;  // lanes of one t
  constexpr int kRows = Type::kCodes == 2 ? 2 : 1;                     // rows of W in them, one beside the other
  float lanes[kLanes];
  __builtin_memcpy(lanes, &sums, sizeof(lanes));
  for (int t = 0; t < kLanes / kOfT; ++t) {
    float* row = out + 2 * (part * (kLanes / kOfT) + t);
    for (int i = 0; i < kRows; ++i) {
      float sum = 0;
      for (int lane = i; lane < kOfT; lane += kRows) sum += lanes[t * kOfT + lane];
      row[kOffset[Type::Row(i, c)]] += sum * Type::Factor(c);
    }
  }
}

// Codes c = first ... first + count - 1 of one part of a tile times R rows of x, through all units.
template <class Type, int R, int first, int count>
JMM_INLINE void AddPart(const int32_t* words, int units, const Floats* x, Floats (&sums)[Type::kCodes][R]) {
  using C = Cut<Type>;
#pragma GCC unroll 1
  for (int col = 0; col < 8 * units; ++col, words += C::kLineWords, x += C::kColX * R) {
#pragma GCC unroll 4
    for (int v = 0; v < C::kVectors; ++v) {
      Words line;
      __builtin_memcpy(&line, words + v * kLanes, sizeof(line));
#pragma GCC unroll 2
      for (int b = 0; b < Type::kHalves; ++b) {
        const Words ready = Type::Ready(line, b);
#pragma GCC unroll 4
        for (int c = first; c < first + count; ++c) {
          const Floats values = Type::Value(ready, c);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sums[c][r] += values * x[(v * Type::kHalves + b) * R + r];
        }
      }
    }
  }
}

template <class Type, int R>
void AddRows(const TransposedSegment& segment, int row) {
  using C = Cut<Type>;
  // Sums that fit the registers beside what they are made of.
  constexpr int kAtOnce = R > 2 && kLanes < 16 ? 2 : Type::kCodes;
  constexpr int kTileWords = 8 * C::kLineWords;
  Floats x[kSegmentUnits * C::kUnitX * R];
  Expand<Type, R>(segment, row, x);
  float* out = segment.out + row * segment.out_stride;
  for (int tile = 0; tile < segment.tiles; ++tile, out += kTileK) {
    const int32_t* words = segment.words + tile * segment.tile_stride;
    const char* next = reinterpret_cast<const char*>(words + (tile + 1 < segment.tiles ? segment.tile_stride : 0));
    for (int byte = 0; byte < segment.units * kTileWords * 4; byte += 64) __builtin_prefetch(next + byte);
    for (int part = 0; part < C::kParts; ++part) {
      Floats sums[Type::kCodes][R] = {};
      const int32_t* first = words + part * C::kPartWords;
      AddPart<Type, R, 0, kAtOnce>(first, segment.units, x, sums);
      if constexpr (kAtOnce < Type::kCodes) AddPart<Type, R, kAtOnce, kAtOnce>(first, segment.units, x, sums);
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < Type::kCodes; ++c) AddLanes<Type>(sums[c][r], part, c, out + r * segment.out_stride);
      }
    }
  }
}

template <class Type>
void RunTyped(const TransposedSegment& segment) {
  int row = 0;
  for (; row + kSharers <= segment.rows; row += kSharers) AddRows<Type, kSharers>(segment, row);
  switch (segment.rows - row) {
    case 1:
      return AddRows<Type, 1>(segment, row);
    case 2:
      return AddRows<Type, 2>(segment, row);
    case 3:
      return AddRows<Type, 3>(segment, row);
    default:
      return;
  }
}

void RunSegment(const TransposedSegment& segment) {
  switch (segment.code) {
    case Code::kInt4:
      return RunTyped<Int4>(segment);
    case Code::kInt8:
      return RunTyped<Int8>(segment);
    case Code::kE2M1:
      return RunTyped<E2M1>(segment);
    case Code::kBf16:
      return RunTyped<Bf16>(segment);
    case Code::kFp16:
      return RunTyped<Fp16>(segment);
#define JMM_RUN(name, call_name, exponent_bits) \
  case Code::k##name:                           \
    return RunTyped<FloatByte<exponent_bits>>(segment);
      JMM_FLOAT_BYTES(JMM_RUN)
#undef JMM_RUN
  }
}

}  // namespace
}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_TRANSPOSED_SEGMENT_H_
