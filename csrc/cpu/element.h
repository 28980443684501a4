// Conversions of the small floating-point types: exact to float32, and to nearest even from it.
//
// Not for the instruction-set files: they convert with their own instructions.
#ifndef JAX_MARLIN_MOE_CPU_ELEMENT_H_
#define JAX_MARLIN_MOE_CPU_ELEMENT_H_

#include <cstdint>
#include <cstring>

#include "cpu/gemm.h"

namespace jax_marlin_moe::cpu {

inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t BitsFromFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatFromBf16(uint16_t bits) { return FloatFromBits(static_cast<uint32_t>(bits) << 16); }

inline uint16_t Bf16FromFloat(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded);
}

inline float FloatFromF16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7FFF;
  if (magnitude >= 0x7C00) return FloatFromBits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // The unit of a subnormal is 2^-24; it needs no bit search this way, nor float32 subnormals.
  if (magnitude < 0x400) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return FloatFromBits(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

inline uint16_t F16FromFloat(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7E00;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: the unit is 2^-24
    // Adding 0.5 puts the unit in the last place of a float32, so the addition rounds to nearest even.
    return sign | static_cast<uint16_t>(BitsFromFloat(FloatFromBits(magnitude) + 0.5f) - 0x3F000000);
  }
  const uint32_t rebiased = magnitude - ((127u - 15u) << 23);
  return sign | static_cast<uint16_t>((rebiased + 0xFFF + ((rebiased >> 13) & 1)) >> 13);
}

inline float FloatFromElement(uint16_t bits, Element type) {
  return type == Element::kBf16 ? FloatFromBf16(bits) : FloatFromF16(bits);
}

// A number of a type whose bits below the sign, moved up by `shift`, are those of a float32 less an exponent bias of
// 127 - bias. Subnormals come out right where the thread keeps them (float_mode.h).
inline float FloatFromMinifloat(uint32_t sign, uint32_t magnitude, int shift, int bias) {
  return FloatFromBits(sign << 31 | magnitude << shift) * FloatFromBits(static_cast<uint32_t>(254 - bias) << 23);
}

inline float FloatFromE2M1(uint32_t code) { return FloatFromMinifloat(code >> 3, code & 7, 22, 1); }

// A float of 8 bits; patterns of NaN and infinity read on as numbers.
template <int kExponentBits>
inline float FloatFromFloatByte(uint32_t code) {
  return FloatFromMinifloat(code >> 7, code & 0x7F, 16 + kExponentBits, (1 << (kExponentBits - 1)) - 1);
}

// Without a branch around the arithmetic, so that compilers convert vectors; NaN has a mask's bits on top of others.
inline float FloatFromE4M3(uint8_t bits) {
  const uint32_t nan = (bits & 0x7F) == 0x7F ? 0x7FC00000 : 0;
  return FloatFromBits(BitsFromFloat(FloatFromFloatByte<4>(bits)) | nan);
}

// 2^(bits - 127), the first of them a subnormal; NaN for 255.
inline float FloatFromE8M0(uint8_t bits) {
  if (bits == 0) return FloatFromBits(0x00400000);
  return bits == 255 ? FloatFromBits(0x7FC00000) : FloatFromBits(static_cast<uint32_t>(bits) << 23);
}

inline void RoundRow(const float* values, int64_t count, Element type, uint16_t* out) {
  if (type == Element::kBf16) {
    for (int64_t i = 0; i < count; ++i) out[i] = Bf16FromFloat(values[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = F16FromFloat(values[i]);
  }
}

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_ELEMENT_H_
