// A layer in the phases of its router, one that lists the slots of its block, those of the block, and one that adds
// what identity experts return.
#include "cpu/moe_layer.h"

#include <algorithm>

#include "cpu/element.h"
#include "cpu/scratch.h"

namespace jax_marlin_moe::cpu {
namespace {

// The slots of the block: for each token the experts chosen, and behind them all shared ones, whose ids follow those of
// the routed ones.
struct Slots {
  explicit Slots(const MoeLayer& layer)
      : per_token(layer.router.top_k + layer.shared()), count(layer.router.tokens * per_token) {
    ids.resize(static_cast<size_t>(count));
    weights.resize(ids.size());
    if (layer.apply_on_input) rows.resize(ids.size() * static_cast<size_t>(layer.block.gate_up->k()));
  }

  const int64_t per_token, count;
  Scratch<int32_t> ids;
  Scratch<float> weights;
  Scratch<uint16_t> rows;  // of x, one for each slot, where weights multiply them
};

float SharedWeight(const MoeLayer& layer, const uint16_t* row) {
  if (layer.shared_gate.data == nullptr) return 1.0f;
  float sum = 0.0f;
  for (int64_t k = 0; k < layer.router.hidden; ++k) {
    sum += FloatFromElement(row[k], layer.block.type) * layer.shared_gate[k];
  }
  return Sigmoid(sum);
}

// Fills the slots of one token.
void FillSlots(const MoeLayer& layer, int64_t token, Slots& slots) {
  const Element type = layer.block.type;
  const int64_t hidden = layer.block.gate_up->k(), top_k = layer.router.top_k, first = token * slots.per_token;
  const uint16_t* const x = layer.block.x + token * hidden;
  for (int64_t j = 0; j < top_k; ++j) {
    const auto slot = static_cast<size_t>(first + j);
    const int32_t id = layer.router.topk_ids[token * top_k + j];
    const float weight = layer.router.topk_weights[token * top_k + j];
    // In the block an id behind the routed experts is one of a shared expert.
    slots.ids[slot] = id < layer.routed() ? id : -1;
    slots.weights[slot] = layer.apply_on_input ? 1.0f : weight;
    if (!layer.apply_on_input) continue;
    uint16_t* const row = slots.rows.data() + (first + j) * hidden;
    for (int64_t k = 0; k < hidden; ++k) {
      const float product = FloatFromElement(x[k], type) * weight;
      RoundRow(&product, 1, type, row + k);
    }
  }
  if (layer.shared() == 0) return;
  const float weight = SharedWeight(layer, x);
  for (int64_t j = top_k; j < slots.per_token; ++j) {
    const auto slot = static_cast<size_t>(first + j);
    slots.ids[slot] = static_cast<int32_t>(layer.routed() + j - top_k);
    slots.weights[slot] = weight;
    if (layer.apply_on_input) std::copy_n(x, hidden, slots.rows.data() + (first + j) * hidden);
  }
}

// The layer's expert_map, with the shared experts behind the routed ones; empty where it has none.
Scratch<int32_t> MapWithShared(const MoeLayer& layer) {
  const int32_t* const given = layer.block.routing.expert_map;
  Scratch<int32_t> map;
  if (given == nullptr) return map;
  const int64_t local_experts = layer.block.down->experts;
  map.assign(given, given + layer.routed());
  for (int32_t& local : map) {
    if (local >= local_experts) local = -1;
  }
  for (int64_t s = 0; s < layer.shared(); ++s) map.push_back(static_cast<int32_t>(local_experts + s));
  return map;
}

// Adds what a token's identity experts return, which is its row of x, to the sums of its other experts, and rounds
// once.
void AddIdentityExperts(const MoeLayer& layer, int64_t token, float* sums) {
  const ExpertBlock& block = layer.block;
  const Router& router = layer.router;
  const int64_t hidden = block.gate_up->k(), columns = block.down->n();
  float weight = 0.0f;
  for (int64_t slot = token * router.top_k; slot < (token + 1) * router.top_k; ++slot) {
    const int32_t id = router.topk_ids[slot];
    if (id >= layer.routed() && id < router.experts) weight += router.topk_weights[slot];
  }
  for (int64_t k = 0; k < std::min(hidden, columns); ++k) {
    sums[k] += weight * FloatFromElement(block.x[token * hidden + k], block.type);
  }
  if (block.float_result) {
    std::copy_n(sums, columns, static_cast<float*>(block.y) + token * columns);
  } else {
    RoundRow(sums, columns, block.type, static_cast<uint16_t*>(block.y) + token * columns);
  }
}

}  // namespace

void RunMoeLayer(Workers& workers, const MoeLayer& layer) {
  RunRouter(workers, layer.router);
  const int64_t tokens = layer.router.tokens;
  Slots slots(layer);
  RunPhases(workers, {{tokens, [&](int64_t token) { FillSlots(layer, token, slots); }}});

  const Scratch<int32_t> map = MapWithShared(layer);
  ExpertBlock block = layer.block;
  block.routing.topk_ids = slots.ids.data();
  block.routing.slots = slots.count;
  block.routing.num_experts = layer.routed() + layer.shared();
  if (block.routing.expert_map != nullptr) block.routing.expert_map = map.data();
  block.topk_weights = slots.weights.data();
  block.top_k = slots.per_token;
  block.slots_per_row = layer.apply_on_input ? 1 : slots.per_token;
  if (layer.apply_on_input) block.x = slots.rows.data();
  if (layer.identity_experts == 0) return RunExpertBlock(workers, block);

  const int64_t columns = block.down->n();
  Scratch<float> sums(static_cast<size_t>(tokens * columns));
  block.y = sums.data();
  block.float_result = true;
  RunExpertBlock(workers, block);
  const auto add = [&](int64_t token) { AddIdentityExperts(layer, token, sums.data() + token * columns); };
  RunPhases(workers, {{tokens, add}});
}

}  // namespace jax_marlin_moe::cpu
