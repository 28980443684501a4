// Scales and zero points of one group of a unit, in float32 and in the order in which they are stored.
#ifndef JAX_MARLIN_MOE_CPU_GROUP_SCALES_H_
#define JAX_MARLIN_MOE_CPU_GROUP_SCALES_H_

#include <cstdint>

#include "cpu/gemm.h"

namespace jax_marlin_moe::cpu {

// The column of a unit that comes at place `i` of Marlin's grouped order.
constexpr int ColumnOfGroupedOrder(int i) { return i % 8 * 8 + i / 8; }

struct GroupScales {
  float scale[kUnit];
  float excess[kUnit];  // of the zero points over what the values of codes have already subtracted, if has_excess
  bool has_excess;

  void Load(const ExpertMatrix& matrix, int64_t group, int64_t unit);

  // Scales times a global scale.
  void MultiplyBy(float global_scale);

  // scaled[i] = x[i] * scale[i]; the sum of excess[i] * scaled[i], 0 without excess.
  float Apply(const float* x, float* scaled) const;
};

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_GROUP_SCALES_H_
