// One grouped product without bias: y[slot] = x[slot / slots_per_row] @ W[expert of slot], or @ W^T.
#ifndef JAX_MARLIN_MOE_CPU_GROUPED_PRODUCT_H_
#define JAX_MARLIN_MOE_CPU_GROUPED_PRODUCT_H_

#include <cstdint>

#include "cpu/expert_stack.h"
#include "cpu/phases.h"

namespace jax_marlin_moe::cpu {

struct GroupedProduct {
  const uint16_t* x;  // [slots / slots_per_row, inputs()]
  Element type;
  int64_t slots_per_row;  // consecutive slots that read one row of x
  int64_t slots;
  const ExpertStack* stack;
  bool transposed;
  const int32_t* experts;  // [slots]; whatever is not in [0, stack->experts) makes a row of zeros
  void* y;                 // [slots, outputs()] of x's type, or float32
  bool float_results;

  int64_t inputs() const { return transposed ? stack->n() : stack->k(); }
  int64_t outputs() const { return transposed ? stack->k() : stack->n(); }
};

// Fills y.
void RunGroupedProduct(Workers& workers, const GroupedProduct& product);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_GROUPED_PRODUCT_H_
