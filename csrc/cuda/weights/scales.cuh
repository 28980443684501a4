// The scales of a few neighbouring columns of one lane, for kernels whose warps have less than 64 columns each.
#pragma once

#include "ptx/hopper.cuh"
#include "weights/fragments_raw.cuh"

namespace jmm {

// A stored scale as float32, kUnit of its ColumnScales too small.
template <class Scale>
__device__ __forceinline__ float decode_scale(uint32_t bits) {
  return to_float<Scale>(static_cast<uint16_t>(bits));
}
template <>
__device__ __forceinline__ float decode_scale<Float>(uint32_t bits) {
  return __uint_as_float(bits);
}
template <>
__device__ __forceinline__ float decode_scale<E4M3Scale>(uint32_t bits) {
  return to_float<Half>(static_cast<uint16_t>(bits << 7));
}
// 0 stands for 2^-127, which float32 has as a subnormal. (NaN reads as infinity; importers refuse it.)
template <>
__device__ __forceinline__ float decode_scale<E8M0Scale>(uint32_t bits) {
  return __uint_as_float(max(bits << 23, 1u << 22));
}

// Whether every scale is exact in T, and its product with a code that T holds exactly is rounded once at most.
template <class T, class Scale>
constexpr bool kHoldsScale = false;
template <class T>
constexpr bool kHoldsScale<T, T> = true;
template <class T>
constexpr bool kHoldsScale<T, E4M3Scale> = true;
template <>
constexpr bool kHoldsScale<BFloat, E8M0Scale> = true;

// The scales of columns g and g + 8 of kParts sub-tiles, neighbours in Marlin's order.
template <class Scale, int kParts>
class PartScales {
  static constexpr int kBytes = ColumnScales<Scale>::kBytes;
  static constexpr int kWords = (2 * kParts * kBytes + 3) / 4;
  uint32_t words[kWords];

 public:
  PartScales() = default;
  __device__ __forceinline__ explicit PartScales(uint32_t shared) {
    if constexpr (2 * kParts * kBytes == 2) {
      words[0] = load_shared2(shared);
    } else {
      load_shared_words(words, shared);
    }
  }
  __device__ __forceinline__ float get(int part, int b) const {
    constexpr int kPerWord = 4 / kBytes, kBits = 8 * kBytes;
    constexpr uint32_t kMask = kBytes == 4 ? ~0u : (1u << (kBits % 32)) - 1;
    const int i = 2 * part + b;
    return decode_scale<Scale>(words[i / kPerWord] >> (kBits * (i % kPerWord)) & kMask);
  }
};

}  // namespace jmm
