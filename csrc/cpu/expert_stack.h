// The quantised matrices of all experts, one after another in memory, and a view of each.
#ifndef JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_
#define JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_

#include <cstdint>

#include "cpu/gemm.h"

namespace jax_marlin_moe::cpu {

struct ExpertStack {
  int64_t experts = 0;
  ExpertMatrix first = {};   // of expert 0
  int64_t packed_words = 0;  // from an expert to the next
  int64_t scale_bytes = 0;
  int64_t zero_bytes = 0;
  const float* global_scales = nullptr;  // [experts, n / kUnit] or null
  const float* bias = nullptr;           // [experts, n] or null

  int64_t k() const { return first.k; }
  int64_t n() const { return first.n; }
};

// The matrix of one expert, and its global scales [n / kUnit] or null.
ExpertMatrix Expert(const ExpertStack& stack, int64_t expert);
const float* GlobalScales(const ExpertStack& stack, int64_t expert);

// A panel of `rows` rows and the units [first_unit, end_unit), for MultiplyExpert.
Panel UnitsOfRows(const uint16_t* const* x, Element x_type, int rows, int64_t first_unit, int64_t end_unit, float* out);

// Computes `panel` with the matrix of one expert, which it fills in, then applies the expert's global scales and adds
// its bias.
void MultiplyExpert(const ExpertStack& stack, int64_t expert, Panel panel);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_
