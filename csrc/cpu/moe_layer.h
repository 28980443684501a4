// A whole layer: the router, and the expert block of what it chose, with the shared and the identity experts.
#ifndef JAX_MARLIN_MOE_CPU_MOE_LAYER_H_
#define JAX_MARLIN_MOE_CPU_MOE_LAYER_H_

#include <cstdint>

#include "cpu/expert_block.h"
#include "cpu/phases.h"
#include "cpu/router.h"

namespace jax_marlin_moe::cpu {

// Ids of the router's experts are those of routed experts first, then those of identity experts.
struct MoeLayer {
  Router router;  // its topk_weights and topk_ids are results of the layer too
  // x is [tokens, hidden], one row per token, and expert_map one of the routed experts. RunMoeLayer fills in the rest
  // of the routing, its weights and which rows it reads.
  ExpertBlock block;
  Numbers shared_gate;       // [router.hidden, 1], whose sigmoid shared experts are weighted with, or none
  bool apply_on_input;       // whether weights multiply rows of x instead of results
  int64_t identity_experts;  // experts that return their input

  int64_t routed() const { return router.experts - identity_experts; }
  int64_t shared() const { return block.shared_down == nullptr ? 0 : block.shared_down->experts; }
};

// Fills the results of the router and of the block.
void RunMoeLayer(Workers& workers, const MoeLayer& layer);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_MOE_LAYER_H_
