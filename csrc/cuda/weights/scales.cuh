// From stored scales to float32: one decoder per type of scale.
#pragma once

#include "ptx/memory.cuh"
#include "ptx/numbers.cuh"

namespace jmm {

// Types of scales: Half, BFloat, Float, and bit patterns of one byte.
struct Float {};
struct E4M3Scale {};
struct E8M0Scale {};

// The scales of kCount of one lane's columns g + 8 j (g = lane / 4), which are neighbours in Marlin's order. `Element`
// is what the array holds, of kBytes. `scales[j]` is kFactor times the scale, which is made up for once per work tile;
// `exact(j)` is the same where even the least scale counts, `selected(j)` where j is known at run time only.
template <class Scale, int kCount>
struct ColumnScales;

// The word that has number j, kPerWord in each: selected, because an index into registers is a constant.
template <int kPerWord, int kWord = 0, int kWords>
__device__ __forceinline__ uint32_t word_of(const uint32_t (&words)[kWords], int j) {
  if constexpr (kWord + 1 == kWords) {
    return words[kWord];
  } else {
    return j < (kWord + 1) * kPerWord ? words[kWord] : word_of<kPerWord, kWord + 1>(words, j);
  }
}

template <class Scale, int kCount>
struct ColumnScales {  // of 16-bit types
  using Element = Scale;
  static constexpr int kBytes = 2;
  static constexpr float kFactor = 1.0f;
  uint32_t pairs[kCount / 2];

  __device__ __forceinline__ void load(uint32_t shared) { load_shared_words(pairs, shared); }
  __device__ __forceinline__ float operator[](int j) const { return decode(pairs[j / 2], j); }
  __device__ __forceinline__ float exact(int j) const { return (*this)[j]; }
  __device__ __forceinline__ float selected(int j) const { return decode(word_of<2>(pairs, j), j); }

 private:
  __device__ __forceinline__ static float decode(uint32_t pair, int j) {
    return to_float<Scale>(static_cast<uint16_t>(pair >> (16 * (j % 2))));
  }
};

template <int kCount>
struct ColumnScales<Float, kCount> {
  using Element = float;
  static constexpr int kBytes = 4;
  static constexpr float kFactor = 1.0f;
  uint32_t words[kCount];

  __device__ __forceinline__ void load(uint32_t shared) { load_shared_words(words, shared); }
  __device__ __forceinline__ float operator[](int j) const { return __uint_as_float(words[j]); }
  __device__ __forceinline__ float exact(int j) const { return (*this)[j]; }
  __device__ __forceinline__ float selected(int j) const { return __uint_as_float(word_of<1>(words, j)); }
};

// One byte per scale.
template <int kCount>
__device__ __forceinline__ void load_bytes(uint32_t (&words)[(kCount + 3) / 4], uint32_t shared) {
  if constexpr (kCount == 2) {
    words[0] = load_shared2(shared);
  } else {
    load_shared_words(words, shared);
  }
}

// Two at a time through float16: by an instruction where the architecture has it. Elsewhere, since block scales are not
// negative, their 7 bits at the low end of float16's exponent are the scale times 2^(7 - 15), subnormals included.
template <int kCount>
struct ColumnScales<E4M3Scale, kCount> {
  using Element = unsigned char;
  static constexpr int kBytes = 1;
  static constexpr float kFactor = kConvertsE4M3 ? 1.0f : power_of_two(7 - Half::kExponentBias);
  static constexpr int kWords = (kCount + 3) / 4;
  uint32_t pairs[2 * kWords];  // converted, [j / 2] holds j and j + 1; otherwise [j / 4 * 2 + j % 2] holds j and j + 2

  __device__ __forceinline__ void load(uint32_t shared) {
    uint32_t words[kWords];
    load_bytes<kCount>(words, shared);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kConvertsE4M3) {
        pairs[2 * i] = halves_of_e4m3_pair(words[i]), pairs[2 * i + 1] = halves_of_upper_e4m3_pair(words[i]);
      } else {
        pairs[2 * i] = (words[i] & 0x007F007Fu) << 7, pairs[2 * i + 1] = (words[i] & 0x7F007F00u) >> 1;
      }
    }
  }
  __device__ __forceinline__ float operator[](int j) const {
    const uint32_t pair = kConvertsE4M3 ? pairs[j / 2] : pairs[j / 4 * 2 + j % 2];
    const int half = kConvertsE4M3 ? j % 2 : j / 2 % 2;
    return half ? upper_half_to_float(pair) : to_float<Half>(static_cast<uint16_t>(pair));
  }
  __device__ __forceinline__ float exact(int j) const { return (*this)[j]; }
};

// The power of two of an exponent byte. 0 stands for 2^-127, float32's largest subnormal power.
__device__ __forceinline__ float e8m0_scale(uint32_t exponent) {
  return __uint_as_float(max(exponent << 23, 1u << 22));
}

// The exponent of a float32. 0 stands for 2^-127, less than float32's least normal number: taken as zero, but for
// `exact`, which gives the subnormal. (NaN reads as infinity; importers refuse it.)
template <int kCount>
struct ColumnScales<E8M0Scale, kCount> {
  using Element = unsigned char;
  static constexpr int kBytes = 1;
  static constexpr float kFactor = 1.0f;
  uint32_t words[(kCount + 3) / 4];

  __device__ __forceinline__ void load(uint32_t shared) { load_bytes<kCount>(words, shared); }
  __device__ __forceinline__ float operator[](int j) const { return __uint_as_float(exponent(j)); }
  __device__ __forceinline__ float exact(int j) const { return e8m0_scale(byte(j)); }
  // `exact` as a pair of bfloat16, whose exponents are as wide.
  __device__ __forceinline__ uint32_t exact_pair(int j) const {
    constexpr uint32_t kLeast = 0x00400040u;  // 2^-127
    return max(byte(j) * 0x00800080u, kLeast);
  }

 private:
  __device__ __forceinline__ uint32_t byte(int j) const { return words[j / 4] >> (8 * (j % 4)) & 0xFFu; }
  __device__ __forceinline__ uint32_t exponent(int j) const { return byte(j) << 23; }
};

// Whether every scale is exact in T, and its product with a code that T holds exactly is rounded once at most.
template <class T, class Scale>
constexpr bool kHoldsScale = false;
template <class T>
constexpr bool kHoldsScale<T, T> = true;
template <class T>
constexpr bool kHoldsScale<T, E4M3Scale> = true;
template <>
constexpr bool kHoldsScale<BFloat, E8M0Scale> = true;

}  // namespace jmm
