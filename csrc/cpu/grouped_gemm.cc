// A grouped product in one phase: an item is a group of rows of one expert times some units.
#include "cpu/grouped_gemm.h"

#include <algorithm>

#include "cpu/align.h"
#include "cpu/element.h"
#include "cpu/row_items.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kItemUnits = 8;  // most units of a work item

// `units` units from `first_unit` on of one group's rows.
void Item(const GroupedGemm& gemm, const RowGroup& group, const int32_t* slots, int64_t first_unit, int units) {
  const int64_t k = gemm.stack->k(), n = gemm.stack->n();
  const uint16_t* inputs[kPanelRows];
  for (int r = 0; r < group.count; ++r) {
    inputs[r] = gemm.x + (gemm.rows == nullptr ? slots[r] / gemm.top_k : gemm.rows[slots[r]]) * k;
  }
  alignas(64) float product[kPanelRows * kItemUnits * kUnit];
  MultiplyExpert(*gemm.stack, group.expert,
                 UnitsOfRows(inputs, gemm.type, group.count, first_unit, first_unit + units, product));
  const int64_t width = static_cast<int64_t>(units) * kUnit;
  for (int r = 0; r < group.count; ++r) {
    float* row = product + r * width;
    if (gemm.topk_weights != nullptr) {
      const float weight = gemm.topk_weights[slots[r]];
      for (int64_t c = 0; c < width; ++c) row[c] *= weight;
    }
    RoundRow(row, width, gemm.type, gemm.y + slots[r] * n + first_unit * kUnit);
  }
}

}  // namespace

void RunGroupedGemm(Workers& workers, const GroupedGemm& gemm) {
  const int64_t n = gemm.stack->n();
  const RowGroups rows = GroupRows(gemm.sorted_token_ids, gemm.length, gemm.expert_ids, gemm.block_size, gemm.slots,
                                   gemm.stack->experts, kPanelRows);
  for (int64_t slot = 0; slot < gemm.slots; ++slot) {
    if (!rows.scheduled[static_cast<size_t>(slot)]) std::fill_n(gemm.y + slot * n, n, uint16_t{0});
  }

  auto item = [&](const RowGroup& group, int64_t first, int64_t last) {
    Item(gemm, group, rows.slots.data() + group.first, first, static_cast<int>(last - first));
  };
  RunPhases(workers, {RowPhase(rows, n / kUnit, kItemUnits, workers.count(), item)});
}

}  // namespace jax_marlin_moe::cpu
