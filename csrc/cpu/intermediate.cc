// Quantisers of the intermediate and the table of their names.
#include "cpu/intermediate.h"

#include "cpu/element.h"

namespace jax_marlin_moe::cpu {
namespace {

// The nearest float of that many bits of mantissa, ties to even, saturating; NaN stays NaN. Normal numbers begin with
// 2^least_exponent. The sum with 1.5 * 2^23 units has no bits below the unit.
template <int kMantissaBits, int kLeastExponent, int kLargest>
inline float Nearest(float value) {
  constexpr uint32_t kLeast = static_cast<uint32_t>(127 + kLeastExponent) << 23;
  constexpr uint32_t kMagic = (static_cast<uint32_t>(23 - kMantissaBits) << 23) | 0x00400000;
  const float clipped = value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
  const uint32_t exponent = BitsFromFloat(clipped) & 0x7F800000;
  const float magic = FloatFromBits((exponent > kLeast ? exponent : kLeast) + kMagic);
  const float rounded = (clipped + magic) - magic;
  return value == value ? rounded : value;
}

// The e4m3 value nearest to value / scale, zero where the scale is.
inline float E4M3InUnits(float value, float scale) { return scale == 0 ? 0.0f : Nearest<3, -6, 448>(value / scale); }

void StaticFp8(float* values, int64_t count, float scale) {
  for (int64_t i = 0; i < count; ++i) values[i] = E4M3InUnits(values[i], scale);
}

// A NaN does not count as its block's largest value and stays NaN.
void DynamicNvfp4(float* values, int64_t count, float scale) {
  for (int64_t first = 0; first < count; first += kIntermediateBlock) {
    float* block = values + first;
    float largest = 0;
    for (int i = 0; i < kIntermediateBlock; ++i) {
      const float magnitude = block[i] < 0 ? -block[i] : block[i];
      largest = magnitude > largest ? magnitude : largest;
    }
    const float block_scale = E4M3InUnits(largest / 6, scale);
    const float divisor = block_scale * scale;
    for (int i = 0; i < kIntermediateBlock; ++i) {
      const float zero = scale == 0 || block[i] == block[i] ? 0.0f : block[i];
      block[i] = divisor == 0 ? zero : Nearest<1, 0, 6>(block[i] / divisor) * block_scale;
    }
  }
}

constexpr IntermediateQuantizer kQuantizers[] = {{"static_fp8", StaticFp8}, {"dynamic_nvfp4", DynamicNvfp4}};

}  // namespace

const IntermediateQuantizer* FindIntermediateQuantizer(std::string_view name) {
  for (const IntermediateQuantizer& row : kQuantizers) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

std::string IntermediateQuantizerNames() {
  std::string names;
  for (const IntermediateQuantizer& row : kQuantizers) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

}  // namespace jax_marlin_moe::cpu
