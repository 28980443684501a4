// The transposed kernel in standard C++. Its inner loops run over the words of a packed line, which compilers vectorise
// for the instruction set of the file that includes this one.
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

constexpr int kLine = 16;                 // lanes [t][w]
constexpr int kSharers = 4;               // rows that share one dequantisation
constexpr int kOffset[4] = {0, 1, 8, 9};  // code j of a column in the words of one t has k = 2t + kOffset[j]
constexpr int kLines = kChunk / 4;        // vectors of x, [col][b]

inline float BitsAsFloat(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Code j of half b in a lane, as float32 less its center.
struct Nibbles {
  static constexpr int kBits = 4;
  static uint32_t Extract(const int32_t* line, int lane, int b, int j) {
    constexpr int kShift[4] = {0, 16, 4, 20};
    return static_cast<uint32_t>(line[lane]) >> (kShift[j] + 8 * b) & 15;
  }
};
struct Bytes {  // in the order [t][w][b]
  static constexpr int kBits = 8;
  static uint32_t Extract(const int32_t* line, int lane, int b, int j) {
    constexpr int kShift[4] = {0, 16, 8, 24};
    return static_cast<uint32_t>(line[2 * lane + b]) >> kShift[j] & 255;
  }
};
struct Halfwords {  // in the order [t][w][b][j / 2]
  static constexpr int kBits = 16;
  static uint32_t Extract(const int32_t* line, int lane, int b, int j) {
    return static_cast<uint32_t>(line[4 * lane + 2 * b + j / 2]) >> (16 * (j % 2)) & 0xFFFF;
  }
};
struct Int4 : Nibbles {
  static float Value(uint32_t code) { return static_cast<float>(static_cast<int32_t>(code) - CenterOf(Code::kInt4)); }
};
struct Int8 : Bytes {
  static float Value(uint32_t code) { return static_cast<float>(static_cast<int32_t>(code) - CenterOf(Code::kInt8)); }
};
// Sign and magnitude where a float32 has them, times what its exponent is too wide by.
struct E2M1 : Nibbles {
  static float Value(uint32_t code) { return BitsAsFloat((code & 8) << 28 | (code & 7) << 22) * 0x1p126f; }
};
template <int kExponentBits>
struct FloatByte : Bytes {
  static float Value(uint32_t code) {
    constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
    return BitsAsFloat((code & 128) << 24 | (code & 127) << (16 + kExponentBits)) * (0x1p127f / (1u << kBias));
  }
};

struct Bf16 : Halfwords {
  static float Value(uint32_t code) { return BitsAsFloat(code << 16); }
};
struct Fp16 : Halfwords {
  static float Value(uint32_t code) {
    const uint32_t sign = (code & 0x8000) << 16, magnitude = (code & 0x7FFF) << 13;
    const float number = BitsAsFloat(sign | magnitude) * 0x1p112f;
    return magnitude < 0x7C00u << 13 ? number : BitsAsFloat(sign | 0x7F800000 | magnitude);  // infinities and NaN
  }
};

// x of one chunk, every w four times.
struct ExpandedChunk {
  float x[kLines][kLine];
};

template <class Type, int R>
void AddTile(const int32_t* words, const ExpandedChunk* x, float* const* out) {
  constexpr int kColWords = kTileK * 8 * Type::kBits / 32;
  float sums[4][R][kLine] = {};
  for (int col = 0; col < 8; ++col) {
    for (int b = 0; b < 2; ++b) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        float values[kLine];
        for (int lane = 0; lane < kLine; ++lane) {
          values[lane] = Type::Value(Type::Extract(words + col * kColWords, lane, b, j));
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          for (int lane = 0; lane < kLine; ++lane) sums[j][r][lane] += values[lane] * x[r].x[2 * col + b][lane];
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < 4; ++j) {
      const float* lanes = sums[j][r];
      for (int t = 0; t < 4; ++t, lanes += 4) {
        out[r][2 * t + kOffset[j]] += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
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
      for (int lane = 0; lane < kLine; ++lane) x[r].x[line][lane] = source[line / 2 * 8 + lane % 4 * 2 + line % 2];
    }
    out[r] = segment.out + (row + r) * segment.out_stride;
  }
  for (int tile = 0; tile < segment.tiles; ++tile) {
    AddTile<Type, R>(segment.words + tile * segment.tile_stride, x, out);
    for (int r = 0; r < R; ++r) out[r] += kTileK;
  }
}

template <class Type>
void RunTyped(const TransposedSegment& segment) {
  int row = 0;
  for (; row + kSharers <= segment.rows; row += kSharers) AddRows<Type, kSharers>(segment, row);
  switch (segment.rows - row) {
    case 3:
      return AddRows<Type, 3>(segment, row);
    case 2:
      return AddRows<Type, 2>(segment, row);
    case 1:
      return AddRows<Type, 1>(segment, row);
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
