// Decodes stored scales and zero points.
#include "cpu/group_scales.h"

#include "cpu/element.h"
#include "cpu/transposed.h"

namespace jax_marlin_moe::cpu {
namespace {

// kUnit values from entry `first` on.
void LoadFloats(const void* values, Scale type, int64_t first, float* out) {
  const auto* halves = static_cast<const uint16_t*>(values) + first;
  const auto* bytes = static_cast<const uint8_t*>(values) + first;
  switch (type) {
    case Scale::kBf16:
      for (int i = 0; i < kUnit; ++i) out[i] = FloatFromBf16(halves[i]);
      return;
    case Scale::kF16:
      for (int i = 0; i < kUnit; ++i) out[i] = FloatFromF16(halves[i]);
      return;
    case Scale::kF32:
      for (int i = 0; i < kUnit; ++i) out[i] = static_cast<const float*>(values)[first + i];
      return;
    case Scale::kE4M3:
      for (int i = 0; i < kUnit; ++i) out[i] = FloatFromE4M3(bytes[i]);
      return;
    case Scale::kE8M0:
      for (int i = 0; i < kUnit; ++i) out[i] = FloatFromE8M0(bytes[i]);
      return;
  }
}

}  // namespace

void GroupScales::Load(const ExpertMatrix& matrix, int64_t group, int64_t unit) {
  const int64_t first = group * matrix.n + unit * kUnit;
  const auto center = static_cast<float>(CenterOf(matrix.code));
  LoadFloats(matrix.scales, matrix.scale_type, first, scale);
  has_excess = matrix.zeros_type != Zeros::kNone || matrix.zero_point != center;
  if (!has_excess) return;
  if (matrix.zeros_type == Zeros::kFloat) {
    LoadFloats(matrix.zeros, matrix.scale_type, first, excess);
    for (float& value : excess) value -= center;
  } else if (matrix.zeros_type == Zeros::kNone) {
    for (float& value : excess) value = matrix.zero_point - center;
  } else {
    // docs/formats.md, "Scales, zero points and bias": place 8 * col + j is field 4 * (j % 2) + j / 2 of word `col`, or
    // 2 * (j % 2) + j % 4 / 2 of word 2 * col + j / 4.
    const int bits = matrix.code == Code::kInt4 ? 4 : 8;
    const int32_t* words = static_cast<const int32_t*>(matrix.zeros) + first * bits / 32;
    for (int i = 0; i < kUnit; ++i) {
      const int col = i / 8, j = i % 8;
      const auto word = static_cast<uint32_t>(bits == 4 ? words[col] : words[2 * col + j / 4]);
      const uint32_t code =
          bits == 4 ? word >> (4 * (4 * (j % 2) + j / 2)) & 15 : word >> (8 * (2 * (j % 2) + j % 4 / 2)) & 255;
      excess[i] = static_cast<float>(code) - center;
    }
  }
}

void GroupScales::MultiplyBy(float global_scale) {
  for (float& value : scale) value *= global_scale;
}

float GroupScales::Apply(const float* x, float* scaled) const {
  for (int i = 0; i < kUnit; ++i) scaled[i] = x[i] * scale[i];
  if (!has_excess) return 0;
  float lanes[8] = {};  // sums of their own, so that compilers may use vectors
  for (int i = 0; i < kUnit; i += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += scaled[i + lane] * excess[i + lane];
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

}  // namespace jax_marlin_moe::cpu
