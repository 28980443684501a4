// The router of a layer: logits in float32, and the choice of experts, as `route` has it (jax_marlin_moe/routing.py).
#ifndef JAX_MARLIN_MOE_CPU_ROUTER_H_
#define JAX_MARLIN_MOE_CPU_ROUTER_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "cpu/phases.h"

namespace jax_marlin_moe::cpu {

enum class Number { kBf16, kF16, kF32 };

// An array of floats, or none.
struct Numbers {
  const void* data = nullptr;
  Number type = Number::kF32;

  float operator[](int64_t i) const;
  // Elements first ... first + count - 1.
  void Read(int64_t first, int64_t count, float* out) const;
};

// What the weights of chosen experts are: their scores, the sigmoids of those, or the softmax of each over itself and
// what is close to it and not chosen before it.
enum class Weights { kScores, kSigmoids, kMixed };

// Scores of all experts from a token's logits, in place.
struct Scoring {
  std::string_view name;
  void (*apply)(float* values, int64_t count);
  Weights weights;
};

// Null where there is none of that name.
const Scoring* FindScoring(std::string_view name);
std::string ScoringNames();

struct Router {
  Numbers rows;  // [tokens, row_stride], of which the first `hidden` columns count
  int64_t tokens, hidden, row_stride;
  Numbers kernel;  // [hidden, experts]
  int64_t experts;
  Numbers bias, correction_bias, expert_scale;  // [experts]
  const int32_t* given;                         // [tokens, top_k] experts that are chosen already, or null
  const Scoring* scoring;
  int64_t top_k;
  bool renormalize, softmax_after_topk;
  int64_t num_groups, top_groups;  // equal groups of consecutive experts, of which some stay in the choice
  bool top2;                       // what a group is worth: its best two scores, or its best one
  float scale, renormalize_epsilon;
  float soft_cap;       // of the logits, or 0
  float jitter;         // how close mixed scores are
  Numbers input_scale;  // [hidden] where the router reads rms_norm(rows) * input_scale / sqrt(hidden), or none
  float norm_epsilon;   // of that norm
  float* topk_weights;
  int32_t* topk_ids;  // [tokens, top_k] both
};

// Fills topk_weights and topk_ids. Ids are distinct and in range whatever the logits are, unless they are given.
void RunRouter(Workers& workers, const Router& router);

float Sigmoid(float value);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_ROUTER_H_
