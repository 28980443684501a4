// Views of stacked expert matrices, and what surrounds a panel's product.
#include "cpu/expert_stack.h"

namespace jax_marlin_moe::cpu {

ExpertMatrix Expert(const ExpertStack& stack, int64_t expert) {
  ExpertMatrix matrix = stack.first;
  matrix.packed += expert * stack.packed_words;
  matrix.scales = static_cast<const char*>(matrix.scales) + expert * stack.scale_bytes;
  // Without stored zero points the stride is 0, and the pointer may be null.
  if (matrix.zeros != nullptr) matrix.zeros = static_cast<const char*>(matrix.zeros) + expert * stack.zero_bytes;
  return matrix;
}

const float* GlobalScales(const ExpertStack& stack, int64_t expert) {
  return stack.global_scales == nullptr ? nullptr : stack.global_scales + expert * (stack.n() / kUnit);
}

Panel UnitsOfRows(const uint16_t* const* x, Element x_type, int rows, int64_t first_unit, int64_t end_unit,
                  float* out) {
  Panel panel;
  panel.x = x;
  panel.x_type = x_type;
  panel.rows = rows;
  panel.units = static_cast<int>(end_unit - first_unit);
  for (int i = 0; i < panel.units; ++i) panel.unit[i] = first_unit + i;
  panel.out = out;
  return panel;
}

void MultiplyExpert(const ExpertStack& stack, int64_t expert, Panel panel) {
  panel.weight = Expert(stack, expert);
  ActivePanelKernel()(panel);
  const float* global_scales = GlobalScales(stack, expert);
  const float* bias = stack.bias == nullptr ? nullptr : stack.bias + expert * stack.n();
  if (global_scales == nullptr && bias == nullptr) return;
  float* out = panel.out;
  for (int r = 0; r < panel.rows; ++r) {
    for (int i = 0; i < panel.units; ++i, out += kUnit) {
      if (global_scales != nullptr) {
        for (int c = 0; c < kUnit; ++c) out[c] *= global_scales[panel.unit[i]];
      }
      if (bias != nullptr) {
        const float* unit_bias = bias + panel.unit[i] * kUnit;
        for (int c = 0; c < kUnit; ++c) out[c] += unit_bias[c];
      }
    }
  }
}

}  // namespace jax_marlin_moe::cpu
