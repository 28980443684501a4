// A whole expert block (docs/formats.md, "The expert block"): gate and up, activation, down, and the sum over each
// token's experts.
#ifndef JAX_MARLIN_MOE_CPU_EXPERT_BLOCK_H_
#define JAX_MARLIN_MOE_CPU_EXPERT_BLOCK_H_

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/align.h"
#include "cpu/expert_stack.h"
#include "cpu/intermediate.h"
#include "cpu/phases.h"

namespace jax_marlin_moe::cpu {

struct ExpertBlock {
  const uint16_t* x;      // [slots / slots_per_row, hidden]
  int64_t slots_per_row;  // consecutive slots that read one row of x: top_k, or 1
  Element type;
  const ExpertStack* gate_up;
  const ExpertStack* down;  // of as many experts
  // Experts behind those, of the same sizes, or null.
  const ExpertStack* shared_gate_up = nullptr;
  const ExpertStack* shared_down = nullptr;
  const float* topk_weights;  // [tokens, top_k]
  Routing routing;            // of tokens * top_k slots
  int64_t top_k;
  const Activation* activation;
  const float* activation_parameters;
  const float* x_scale = nullptr;                       // [1], what x is in units of, or null
  const IntermediateQuantizer* intermediate = nullptr;  // or null: rounded to x's type
  const float* intermediate_scales = nullptr;           // [experts] where there is a quantiser
  void* y;  // [tokens, down's columns], float if float_result, else of x's type
  bool float_result;

  int64_t experts() const { return down->experts + (shared_down == nullptr ? 0 : shared_down->experts); }
  int64_t tokens() const { return routing.slots / top_k; }
  int64_t inner() const { return down->k(); }
  int halves() const { return activation->gated ? 2 : 1; }
  // Columns of gate, and of up: inner, or more where gate_up is padded to whole units and down to whole tiles.
  int64_t half() const { return gate_up->n() / halves(); }
  int64_t result_bytes() const { return float_result ? sizeof(float) : sizeof(uint16_t); }
};

// Fills y. Everything that the block points to must hold together; top_k * k and top_k * n must fit int64.
void RunExpertBlock(Workers& workers, const ExpertBlock& block);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_EXPERT_BLOCK_H_
