// The table of expert_gemm (docs/formats.md, "Dispatches"): which rows go through which expert to where.
#ifndef JAX_MARLIN_MOE_CPU_DISPATCHES_H_
#define JAX_MARLIN_MOE_CPU_DISPATCHES_H_

#include <cstdint>

namespace jax_marlin_moe::cpu {

struct Dispatches {
  const int32_t* entries;  // [count, 4] of expert, row of x, row of the result, rows; untrusted
  int64_t count;
  int64_t experts;
  int64_t rows;         // of x
  int64_t result_rows;  // of the result
};

// For each row of the result, the expert (-1: none) and the row of x of the last entry in range that has it. Returns
// how many entries are out of range.
int32_t ResolveDispatches(const Dispatches& dispatches, int32_t* experts, int32_t* rows);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_DISPATCHES_H_
