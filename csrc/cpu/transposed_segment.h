// The transposed kernel. Its vectors are the words of a packed line, which the compiler of the file that includes this
// one puts into the registers of its instruction set.
//
// A line has the words of one col of a chunk: columns 16 * w + 8 * b + col in lanes [t = 0..3][w = 0..3]. Lanes are
// multiplied by x, which depends on w, and accumulated apart; at the end of a tile the lanes of a row of W, which are
// those of one t, are added.
//
// Everything has internal linkage: a shared template instance could be kept from the wrong file.
#ifndef JAX_MARLIN_MOE_CPU_TRANSPOSED_SEGMENT_H_
#define JAX_MARLIN_MOE_CPU_TRANSPOSED_SEGMENT_H_

#include "cpu/transposed.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kLine = 16;  // lanes [t][w]
#if defined(__AVX512F__)
constexpr int kLanes = 16;  // of a vector: a line, or a part of it with some of the t
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kSharers = kLanes == 16 ? 4 : 2;  // rows that share one dequantisation
constexpr int kOffset[4] = {0, 1, 8, 9};        // code j of a column in the words of one t has k = 2t + kOffset[j]
constexpr int kLines = kChunk / 4;              // vectors of x, [col][b]

// Vectors of a compiler's own: registers of the instruction set, or as many as it takes.
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of this file alone
#endif
#define JMM_INLINE __attribute__((always_inline)) inline

JMM_INLINE Floats AsFloats(Words bits) { return reinterpret_cast<Floats>(bits); }

// The words of some lanes of a col as kWordVectors vectors, and code j of half b in them.
struct Nibbles {
  static constexpr int kBits = 4, kWordVectors = 1;
  static JMM_INLINE Words Extract(const Words* words, int b, int j) {
    constexpr int kShift[4] = {0, 16, 4, 20};
    return words[0] >> (kShift[j] + 8 * b) & 15;
  }
};
struct Bytes {  // in the order [t][w][b]
  static constexpr int kBits = 8, kWordVectors = 2;
  static JMM_INLINE Words Extract(const Words* words, int b, int j) {
    constexpr int kShift[4] = {0, 16, 8, 24};
    return words[b] >> kShift[j] & 255;
  }
};
struct Halfwords {  // in the order [t][w][b][j / 2]
  static constexpr int kBits = 16, kWordVectors = 4;
  static JMM_INLINE Words Extract(const Words* words, int b, int j) {
    return words[2 * b + j / 2] >> (16 * (j % 2)) & 0xFFFF;
  }
};

// Values of codes as float32, less their center.
template <class Fields, Code code>
struct Integer : Fields {
  static JMM_INLINE Floats Value(Words codes) {
    return __builtin_convertvector(reinterpret_cast<Integers>(codes) - CenterOf(code), Floats);
  }
};
using Int4 = Integer<Nibbles, Code::kInt4>;
using Int8 = Integer<Bytes, Code::kInt8>;
// Sign and magnitude where a float32 has them, times what its exponent is too wide by.
struct E2M1 : Nibbles {
  static JMM_INLINE Floats Value(Words codes) { return AsFloats((codes & 8) << 28 | (codes & 7) << 22) * 0x1p126f; }
};
template <int kExponentBits>
struct FloatByte : Bytes {
  static JMM_INLINE Floats Value(Words codes) {
    constexpr float kScale = 0x1p127f / (1u << ((1 << (kExponentBits - 1)) - 1));
    return AsFloats((codes & 128) << 24 | (codes & 127) << (16 + kExponentBits)) * kScale;
  }
};
struct Bf16 : Halfwords {
  static JMM_INLINE Floats Value(Words codes) { return AsFloats(codes << 16); }
};
struct Fp16 : Halfwords {
  static JMM_INLINE Floats Value(Words codes) {
    const Words sign = (codes & 0x8000) << 16, magnitude = (codes & 0x7FFF) << 13;
    // What a comparison is true for has all bits set: the exponent of infinities and NaN.
    const Words special = reinterpret_cast<Words>((codes & 0x7C00) == 0x7C00) & 0x7F800000;
    return AsFloats(reinterpret_cast<Words>(AsFloats(sign | magnitude) * 0x1p112f) | special);
  }
};

// x of one chunk, every w four times.
struct ExpandedChunk {
  Floats x[kLines];
};

// Code j of half b. Both are template arguments, so that sums have registers of their own.
template <class Type, int R, int b, int j>
JMM_INLINE void AddCode(const Words* words, int col, const ExpandedChunk* x, Floats (&sums)[4][R]) {
  const Floats values = Type::Value(Type::Extract(words, b, j));
  sums[j][0] += values * x[0].x[2 * col + b];
  if constexpr (R > 1) sums[j][1] += values * x[1].x[2 * col + b];
  if constexpr (R > 2) sums[j][2] += values * x[2].x[2 * col + b];
  if constexpr (R > 3) sums[j][3] += values * x[3].x[2 * col + b];
}

template <class Type, int R, int b>
JMM_INLINE void AddCodes(const Words* words, int col, const ExpandedChunk* x, Floats (&sums)[4][R]) {
  AddCode<Type, R, b, 0>(words, col, x, sums);
  AddCode<Type, R, b, 1>(words, col, x, sums);
  AddCode<Type, R, b, 2>(words, col, x, sums);
  AddCode<Type, R, b, 3>(words, col, x, sums);
}

// The lanes from `first` on of each line.
template <class Type, int R>
JMM_INLINE void AddLanes(const int32_t* tile, int first, const ExpandedChunk* x, float* const* out) {
  constexpr int kVectors = Type::kWordVectors;
  Floats sums[4][R] = {};
#pragma GCC unroll 1
  for (int col = 0; col < 8; ++col) {
    Words words[kVectors];
    const int32_t* line = tile + (col * kLine + first) * kVectors;
    if constexpr (kVectors == 1) {
      __builtin_memcpy(words, line, sizeof(words));
    } else {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int v = 0; v < kVectors; ++v) words[v][lane] = static_cast<uint32_t>(line[kVectors * lane + v]);
      }
    }
    AddCodes<Type, R, 0>(words, col, x, sums);
    AddCodes<Type, R, 1>(words, col, x, sums);
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 4; ++j) {
      float lanes[kLanes];
      __builtin_memcpy(lanes, &sums[j][r], sizeof(lanes));
      for (int t = 0; t < kLanes / 4; ++t) {
        const float* four = lanes + 4 * t;
        out[r][2 * (first / 4 + t) + kOffset[j]] += (four[0] + four[1]) + (four[2] + four[3]);
      }
    }
  }
}

template <class Type, int R>
void AddRows(const TransposedSegment& segment, int row) {
  ExpandedChunk x[R];
  float* out[R];
  for (int r = 0; r < R; ++r) {
    const float* source = segment.x + (row + r) * kChunk;
    for (int line = 0; line < kLines; ++line) {
      for (int lane = 0; lane < kLanes; ++lane) x[r].x[line][lane] = source[line / 2 * 8 + lane % 4 * 2 + line % 2];
    }
    out[r] = segment.out + (row + r) * segment.out_stride;
  }
  for (int tile = 0; tile < segment.tiles; ++tile) {
    for (int first = 0; first < kLine; first += kLanes) {
      AddLanes<Type, R>(segment.words + tile * segment.tile_stride, first, x, out);
    }
    for (int r = 0; r < R; ++r) out[r] += kTileK;
  }
}

template <class Type>
void RunTyped(const TransposedSegment& segment) {
  int row = 0;
  for (; row + kSharers <= segment.rows; row += kSharers) AddRows<Type, kSharers>(segment, row);
  for (; row < segment.rows; ++row) AddRows<Type, 1>(segment, row);
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
