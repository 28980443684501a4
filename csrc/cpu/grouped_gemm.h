// One grouped product: y[slot] = x[row of slot] @ W[expert of slot] + bias, times the router weight.
#ifndef JAX_MARLIN_MOE_CPU_GROUPED_GEMM_H_
#define JAX_MARLIN_MOE_CPU_GROUPED_GEMM_H_

#include <cstdint>

#include "cpu/expert_stack.h"
#include "cpu/phases.h"

namespace jax_marlin_moe::cpu {

struct GroupedGemm {
  const uint16_t* x;  // [rows, k]
  Element type;       // of x and y
  int64_t top_k = 1;
  int64_t slots;
  const ExpertStack* stack;
  const int32_t* rows = nullptr;        // [slots] the row of x of each, or null: slot / top_k
  const float* topk_weights = nullptr;  // [slots] or null
  const int32_t* sorted_token_ids;      // at least `length`; untrusted, see GroupRows
  int64_t length;                       // what is in use; none where it is negative
  const int32_t* expert_ids;            // [ceil(length / block_size)]; untrusted
  int64_t block_size;
  uint16_t* y;  // [slots, n]
};

// Fills y: zeros in the rows of slots that no block of an expert lists; where several list one, the first decides.
void RunGroupedGemm(Workers& workers, const GroupedGemm& gemm);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_GROUPED_GEMM_H_
