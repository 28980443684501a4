// The zero points of one lane's columns: none to load where all are one number, stored as codes, or as floats.
#pragma once

#include "ptx/memory.cuh"
#include "weights/codes.cuh"
#include "weights/scales.cuh"

namespace jmm {

// Kinds of zero points: one for all (0 where codes have a sign), or each group's own, as codes or as floats.
template <int kZero>
struct BakedZero {};
struct IntegerZeros {};
struct FloatZeros {};

// Of columns g + 8 j, j = 0..7 (g = lane / 4). `Element` is what the array holds; kUnitBytes those of 64 columns.
template <class Zeros, class Code, class Scale>
struct ColumnZeros;

template <int kZero, class Code, class Scale>
struct ColumnZeros<BakedZero<kZero>, Code, Scale> {
  using Element = void;
  static constexpr bool kStored = false, kWhole = true;
  static constexpr float kBaked = kZero;
  static constexpr int kUnitBytes = 0;

  __device__ __forceinline__ void load(uint32_t, int) {}
  __device__ __forceinline__ float operator[](int) const { return kBaked; }
};

template <class Code, class Scale>
struct ColumnZeros<IntegerZeros, Code, Scale> {
  using Element = int32_t;
  static constexpr bool kStored = true, kWhole = true;
  static constexpr float kBaked = 0.0f;
  static constexpr int kUnitBytes = 8 * Code::kBits;
  uint32_t words[Code::kBits / 4];

  __device__ __forceinline__ void load(uint32_t shared, int column) {
    load_shared_words(words, shared + column * Code::kBits);
  }
  // docs/formats.md, "Scales, zero points and bias": nibbles in the order 0, 4, 1, 5, ..., bytes in 0, 2, 1, 3.
  __device__ __forceinline__ float operator[](int j) const {
    if constexpr (Code::kBits == 4) return static_cast<float>(words[0] >> (4 * (j / 2 + 4 * (j % 2))) & 0xFu);
    return static_cast<float>(words[j / 4] >> (8 * (j % 4 / 2 + 2 * (j % 2))) & 0xFFu);
  }
};

template <class Code, class Scale>
struct ColumnZeros<FloatZeros, Code, Scale> {
  using Element = typename ColumnScales<Scale, 8>::Element;
  static constexpr bool kStored = true, kWhole = false;
  static constexpr float kBaked = 0.0f;
  static constexpr int kUnitBytes = 64 * ColumnScales<Scale, 8>::kBytes;
  ColumnScales<Scale, 8> zeros;

  __device__ __forceinline__ void load(uint32_t shared, int column) {
    zeros.load(shared + column * 8 * ColumnScales<Scale, 8>::kBytes);
  }
  __device__ __forceinline__ float operator[](int j) const { return zeros.selected(j); }
};

}  // namespace jmm
