// How the input of the second product is stored: rounded to 16 bits, or quantised (docs/formats.md, "Quantised
// intermediates").
//
// Quantised values are in units of the expert's scale, by which the second product's sums are multiplied: they have so
// few bits that 16-bit types hold them exactly. A warp's lanes of one row hold whole blocks of 16 columns, two columns
// each, so that a block's largest value takes three exchanges and no other pass over the rows.
#pragma once

#include "types.cuh"

namespace jmm {

// What is not positive and finite counts as zero.
__device__ __forceinline__ float usable_scale(float scale) {
  return scale > 0.0f && scale < __int_as_float(0x7F800000) ? scale : 0.0f;
}

// The nearest float of so many bits of mantissa, ties to even, saturating; NaN stays NaN. Normal numbers begin with
// 2^kLeastExponent. The sum with 1.5 * 2^23 units has no bits below the unit.
template <int kMantissaBits, int kLeastExponent, int kLargest>
__device__ __forceinline__ float nearest(float value) {
  value = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
  constexpr uint32_t kLeast = (127 + kLeastExponent) << 23, kMagic = ((23 - kMantissaBits) << 23) | 0x00400000;
  const uint32_t exponent = __float_as_uint(value) & 0x7F800000;
  const float magic = __uint_as_float((exponent > kLeast ? exponent : kLeast) + kMagic);
  return value == value ? __fsub_rn(__fadd_rn(value, magic), magic) : value;
}
__device__ __forceinline__ float nearest_e4m3(float value) { return nearest<3, -6, 448>(value); }
__device__ __forceinline__ float nearest_e2m1(float value) { return nearest<1, 0, 6>(value); }

// The e4m3 value nearest to value / scale, zero where the scale is.
__device__ __forceinline__ float e4m3_in_units(float value, float scale) {
  return scale == 0.0f ? 0.0f : nearest_e4m3(__fdiv_rn(value, scale));
}

struct Rounded {
  static constexpr bool kQuantizes = false;
};

struct StaticFp8 {
  static constexpr bool kQuantizes = true;
  __device__ __forceinline__ static void apply(float& first, float& second, float scale) {
    first = e4m3_in_units(first, scale), second = e4m3_in_units(second, scale);
  }
};

struct StaticInt8 {
  static constexpr bool kQuantizes = true;
  // NaN stays NaN.
  __device__ __forceinline__ static float in_units(float value, float scale) {
    if (scale == 0.0f) return 0.0f;
    const float nearest = rintf(__fdiv_rn(value, scale));
    return nearest == nearest ? fminf(fmaxf(nearest, -127.0f), 127.0f) : nearest;
  }
  __device__ __forceinline__ static void apply(float& first, float& second, float scale) {
    first = in_units(first, scale), second = in_units(second, scale);
  }
};

struct DynamicNvfp4 {
  static constexpr bool kQuantizes = true;

  __device__ __forceinline__ static float code(float value, float divisor, float scale) {
    if (divisor == 0.0f) return scale == 0.0f || value == value ? 0.0f : value;
    return nearest_e2m1(__fdiv_rn(value, divisor));
  }

  // Columns g and g + 8 of a block, g = lane / 4: the lanes of equal lane % 4 have the block. A NaN does not count as
  // its largest value and stays NaN.
  __device__ __forceinline__ static void apply(float& first, float& second, float scale) {
    const uint32_t lanes = 0x11111111u << (threadIdx.x % 4);
    float largest = fmaxf(fabsf(first), fabsf(second));
#pragma unroll
    for (int step = 4; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, step));
    const float block_scale = e4m3_in_units(__fdiv_rn(largest, 6.0f), scale);
    const float divisor = __fmul_rn(block_scale, scale);
    first = code(first, divisor, scale) * block_scale, second = code(second, divisor, scale) * block_scale;
  }
};

}  // namespace jmm
