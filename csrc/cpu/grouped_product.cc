// A grouped product in one phase: an item is a group of rows of one expert times a range of its outputs.
#include "cpu/grouped_product.h"

#include <algorithm>

#include "cpu/align.h"
#include "cpu/element.h"
#include "cpu/group_scales.h"
#include "cpu/row_items.h"
#include "cpu/transposed.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kItemUnits = 8;   // most units of a work item
constexpr int kItemTiles = 32;  // most tiles along k of a work item of a transposed product

const uint16_t* RowOf(const GroupedProduct& product, int32_t slot) {
  return product.x + slot / product.slots_per_row * product.inputs();
}

// Outputs [first, first + width) of one row.
void Store(const GroupedProduct& product, int64_t slot, int64_t first, int64_t width, const float* row) {
  const int64_t at = slot * product.outputs() + first;
  if (product.float_results) {
    std::copy_n(row, width, static_cast<float*>(product.y) + at);
  } else {
    RoundRow(row, width, product.type, static_cast<uint16_t*>(product.y) + at);
  }
}

// `units` units from `first_unit` on of one group's rows.
void Item(const GroupedProduct& product, const RowGroup& group, const int32_t* slots, int64_t first_unit, int units) {
  const uint16_t* inputs[kPanelRows];
  for (int r = 0; r < group.count; ++r) inputs[r] = RowOf(product, slots[r]);
  alignas(64) float out[kPanelRows * kItemUnits * kUnit];
  MultiplyExpert(*product.stack, group.expert,
                 UnitsOfRows(inputs, product.type, group.count, first_unit, first_unit + units, out));
  const int64_t width = static_cast<int64_t>(units) * kUnit;
  for (int r = 0; r < group.count; ++r) Store(product, slots[r], first_unit * kUnit, width, out + r * width);
}

// One unit of a row, in Marlin's grouped order.
void LoadGroupedOrder(const uint16_t* row, Element type, float* out) {
  float values[kUnit];
  for (int i = 0; i < kUnit; ++i) values[i] = FloatFromElement(row[i], type);
  for (int col = 0; col < 8; ++col) {
    for (int i = 0; i < 8; ++i) out[8 * col + i] = values[8 * i + col];
  }
}

// `tiles` tiles along k from `first_tile` on of one group's rows, through all columns.
void TransposedItem(const GroupedProduct& product, const RowGroup& group, const int32_t* slots, int64_t first_tile,
                    int tiles) {
  const ExpertMatrix matrix = Expert(*product.stack, group.expert);
  const float* global_scales = GlobalScales(*product.stack, group.expert);
  const int64_t units = matrix.n / kUnit;
  const int64_t tile_words = product.stack->packed_words / (matrix.k / kTileK) / units;
  const int64_t group_tiles = matrix.group_size / kTileK;
  const int64_t width = static_cast<int64_t>(tiles) * kTileK;
  alignas(64) float out[kPanelRows * kItemTiles * kTileK];
  std::fill_n(out, group.count * width, 0.0f);
  const TransposedKernel kernel = ActiveTransposedKernel();

  TransposedSegment segment;
  segment.tile_stride = units * tile_words;
  segment.code = matrix.code;
  segment.rows = group.count;
  segment.out_stride = width;
  for (int64_t first_unit = 0; first_unit < units; first_unit += segment.units) {
    segment.units = static_cast<int>(std::min<int64_t>(kSegmentUnits, units - first_unit));
    float rows[kPanelRows][kSegmentUnits * kUnit];  // in the order of the kernel
    for (int r = 0; r < group.count; ++r) {
      for (int c = 0; c < segment.units; ++c) {
        LoadGroupedOrder(RowOf(product, slots[r]) + (first_unit + c) * kUnit, product.type, rows[r] + c * kUnit);
      }
    }
    for (int64_t tile = first_tile; tile < first_tile + tiles; tile += segment.tiles) {
      const int64_t scale_group = tile / group_tiles;
      segment.tiles = static_cast<int>(std::min((scale_group + 1) * group_tiles, first_tile + tiles) - tile);
      alignas(64) float x[kPanelRows * kSegmentUnits * kUnit];
      float excess[kPanelRows] = {};  // of the zero points
      for (int c = 0; c < segment.units; ++c) {
        GroupScales scales;
        scales.Load(matrix, scale_group, first_unit + c);
        if (global_scales != nullptr) scales.MultiplyBy(global_scales[first_unit + c]);
        for (int r = 0; r < group.count; ++r) {
          float* scaled = x + (r * segment.units + c) * kUnit;
          excess[r] += scales.Apply(rows[r] + c * kUnit, scaled);
        }
      }
      segment.words = matrix.packed + tile * segment.tile_stride + first_unit * tile_words;
      segment.x = x;
      segment.out = out + (tile - first_tile) * kTileK;
      kernel(segment);
      for (int r = 0; r < group.count; ++r) {
        if (excess[r] == 0) continue;
        for (int k = 0; k < segment.tiles * kTileK; ++k) segment.out[r * width + k] -= excess[r];
      }
    }
  }
  for (int r = 0; r < group.count; ++r) Store(product, slots[r], first_tile * kTileK, width, out + r * width);
}

}  // namespace

void RunGroupedProduct(Workers& workers, const GroupedProduct& product) {
  const Routing routing{product.experts, product.slots, product.stack->experts, nullptr};
  const RowGroups rows = GroupByExpert(routing, product.stack->experts, kPanelRows);
  const int64_t row_bytes = product.outputs() * (product.float_results ? 4 : 2);
  for (int64_t slot = 0; slot < product.slots; ++slot) {
    if (rows.scheduled[static_cast<size_t>(slot)]) continue;
    std::fill_n(static_cast<char*>(product.y) + slot * row_bytes, row_bytes, '\0');
  }

  auto item = [&](const RowGroup& group, int64_t first, int64_t last) {
    const int32_t* slots = rows.slots.data() + group.first;
    if (product.transposed) {
      TransposedItem(product, group, slots, first, static_cast<int>(last - first));
    } else {
      Item(product, group, slots, first, static_cast<int>(last - first));
    }
  };
  const int64_t pieces = product.outputs() / (product.transposed ? kTileK : kUnit);
  const int64_t most = product.transposed ? kItemTiles : kItemUnits;
  RunPhases(workers, {RowPhase(rows, pieces, most, workers.count(), item)});
}

}  // namespace jax_marlin_moe::cpu
