// The phases of an expert block: gate and up with the activation, down, and the sum over each token's experts.
#include "cpu/expert_block.h"

#include <algorithm>
#include <cstring>

#include "cpu/element.h"
#include "cpu/row_items.h"
#include "cpu/scratch.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kGateUnits = 4;     // most units of gate columns of a work item, and of up columns
constexpr int kDownUnits = 8;     // most units of a work item of the down matrix
constexpr int kSumColumns = 512;  // most columns of a work item of the final sum

// Most values of a pass that wait for its next phase; tokens beyond go in another pass. Experts are read again in each.
constexpr int64_t kMaxActivated = int64_t{1} << 26;  // 16-bit inputs of the down matrix
constexpr int64_t kMaxProducts = int64_t{1} << 24;   // float32 results of the down matrix, which are summed

// An expert of the block, of its own stack or of the shared one.
void MultiplyOne(const ExpertStack& own, const ExpertStack* shared, int64_t expert, const Panel& panel) {
  if (expert < own.experts) {
    MultiplyExpert(own, expert, panel);
  } else {
    MultiplyExpert(*shared, expert - own.experts, panel);
  }
}

// Activated columns [begin, end) of one group's rows, rounded to x's type, into `out` [rows, inner]. One
// panel has both halves of the columns, each with the whole units around it: up need not begin at a unit.
void GateUpItem(const ExpertBlock& block, const RowGroups& rows, const RowGroup& group, int64_t begin, int64_t end,
                uint16_t* out) {
  static_assert(2 * (kGateUnits + 1) <= kPanelUnits);
  const uint16_t* inputs[kPanelRows];
  for (int r = 0; r < group.count; ++r) {
    inputs[r] = block.x + rows.slots[static_cast<size_t>(group.first + r)] / block.slots_per_row * block.gate_up->k();
  }
  alignas(64) float product[kPanelRows * 2 * (kGateUnits + 1) * kUnit];
  Panel panel;
  panel.x = inputs;
  panel.x_type = block.type;
  panel.rows = group.count;
  panel.units = 0;
  panel.out = product;
  const float* halves[2] = {};  // column `begin` of gate and of up in the first row
  for (int half = 0; half < block.halves(); ++half) {
    const int64_t first = half * block.half() + begin;
    const int64_t last = half * block.half() + end - 1;
    halves[half] = product + panel.units * kUnit + first % kUnit;
    for (int64_t unit = first / kUnit; unit <= last / kUnit; ++unit) {
      panel.unit[panel.units++] = unit;
    }
  }
  MultiplyOne(*block.gate_up, block.shared_gate_up, group.expert, panel);
  const int64_t width = static_cast<int64_t>(panel.units) * kUnit;
  for (int r = 0; r < group.count; ++r) {
    float activated[kGateUnits * kUnit];
    const float* up = block.activation->gated ? halves[1] + r * width : nullptr;
    block.activation->apply(halves[0] + r * width, up, end - begin, block.activation_parameters, activated);
    if (block.intermediate != nullptr) {
      block.intermediate->apply(activated, end - begin, UsableScale(block.intermediate_scales[group.expert]));
    }
    RoundRow(activated, end - begin, block.type, out + (group.first + r) * block.inner() + begin);
  }
}

// A range of columns of the down matrix for one group's rows, times the router weights, into row `slot` of
// out.
void DownItem(const ExpertBlock& block, const RowGroups& rows, const RowGroup& group, const uint16_t* activated,
              int64_t first_unit, int64_t end_unit, float* out) {
  const uint16_t* inputs[kPanelRows];
  for (int r = 0; r < group.count; ++r) inputs[r] = activated + (group.first + r) * block.inner();
  alignas(64) float product[kPanelRows * kDownUnits * kUnit];
  const Panel panel = UnitsOfRows(inputs, block.type, group.count, first_unit, end_unit, product);
  MultiplyOne(*block.down, block.shared_down, group.expert, panel);
  const int64_t width = static_cast<int64_t>(panel.units) * kUnit;
  for (int r = 0; r < group.count; ++r) {
    const int64_t slot = rows.slots[static_cast<size_t>(group.first + r)];
    const float weight = block.topk_weights[slot];
    float* row = out + slot * block.down->n() + first_unit * kUnit;
    for (int64_t c = 0; c < width; ++c) row[c] = product[r * width + c] * weight;
  }
}

// Columns [begin, end) of one token: its slots in ascending order, then the one rounding.
void SumItem(const ExpertBlock& block, const RowGroups& rows, const float* products, int64_t token, int64_t begin,
             int64_t end) {
  float sum[kSumColumns] = {};
  for (int64_t slot = token * block.top_k; slot < (token + 1) * block.top_k; ++slot) {
    if (!rows.scheduled[static_cast<size_t>(slot)]) continue;
    const float* row = products + slot * block.down->n() + begin;
    for (int64_t c = 0; c < end - begin; ++c) sum[c] += row[c];
  }
  char* out = static_cast<char*>(block.y) + (token * block.down->n() + begin) * block.result_bytes();
  if (block.float_result) {
    std::memcpy(out, sum, static_cast<size_t>(end - begin) * sizeof(float));
  } else {
    RoundRow(sum, end - begin, block.type, reinterpret_cast<uint16_t*>(out));
  }
}

// The factors of each expert's columns that make up for what its rows are in units of: those of the stack, times that.
template <class ScaleOfExpert>
Scratch<float> FactorsTimesScales(const ExpertStack& stack, ScaleOfExpert scale) {
  const int64_t units = stack.n() / kUnit;
  Scratch<float> factors(static_cast<size_t>(stack.experts * units));
  for (int64_t i = 0; i < stack.experts * units; ++i) {
    factors[static_cast<size_t>(i)] =
        (stack.global_scales == nullptr ? 1.0f : stack.global_scales[i]) * scale(i / units);
  }
  return factors;
}

// The block of as many tokens as may wait at once.
void RunPass(Workers& workers, const ExpertBlock& block) {
  const int64_t columns = block.down->n();
  const int64_t inner = block.inner();
  const RowGroups rows = GroupByExpert(block.routing, block.experts(), kPanelRows);
  Scratch<uint16_t> activated(rows.slots.size() * static_cast<size_t>(inner));
  Scratch<float> products(static_cast<size_t>(block.routing.slots) * static_cast<size_t>(columns));

  auto gate_up = [&](const RowGroup& group, int64_t first, int64_t last) {
    GateUpItem(block, rows, group, first * kUnit, std::min(last * kUnit, inner), activated.data());
  };
  auto down = [&](const RowGroup& group, int64_t first, int64_t last) {
    DownItem(block, rows, group, activated.data(), first, last, products.data());
  };
  const int64_t sum_splits = CeilDiv(columns, kSumColumns);
  auto sum = [&](int64_t item) {
    const int64_t begin = item % sum_splits * kSumColumns;
    SumItem(block, rows, products.data(), item / sum_splits, begin, std::min<int64_t>(begin + kSumColumns, columns));
  };
  RunPhases(workers, {RowPhase(rows, CeilDiv(inner, kUnit), kGateUnits, workers.count(), gate_up),
                      RowPhase(rows, columns / kUnit, kDownUnits, workers.count(), down),
                      {block.tokens() * sum_splits, sum}});
}

}  // namespace

void RunExpertBlock(Workers& workers, const ExpertBlock& block) {
  const int64_t tokens = block.tokens();
  const int64_t pass_tokens = std::max<int64_t>(
      1, std::min(kMaxActivated / (block.top_k * block.inner()), kMaxProducts / (block.top_k * block.down->n())));
  ExpertStack gate_up = *block.gate_up, down = *block.down;
  Scratch<float> gate_up_factors, down_factors;
  if (block.x_scale != nullptr) {
    gate_up_factors = FactorsTimesScales(gate_up, [&](int64_t) { return UsableScale(*block.x_scale); });
    gate_up.global_scales = gate_up_factors.data();
  }
  if (block.intermediate != nullptr) {
    down_factors = FactorsTimesScales(down, [&](int64_t e) { return UsableScale(block.intermediate_scales[e]); });
    down.global_scales = down_factors.data();
  }
  for (int64_t first = 0; first < tokens; first += pass_tokens) {
    ExpertBlock pass = block;
    pass.gate_up = &gate_up;
    pass.down = &down;
    pass.x += first * block.top_k / block.slots_per_row * block.gate_up->k();
    pass.topk_weights += first * block.top_k;
    pass.routing.topk_ids += first * block.top_k;
    pass.routing.slots = std::min(pass_tokens, tokens - first) * block.top_k;
    pass.y = static_cast<char*>(block.y) + first * block.down->n() * block.result_bytes();
    RunPass(workers, pass);
  }
}

}  // namespace jax_marlin_moe::cpu
