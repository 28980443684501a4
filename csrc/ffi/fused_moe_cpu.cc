// The CPU handler of a whole expert block, FORMATS section 7: gate and up, activation, down, and the sum over
// each token's experts.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/activation.h"
#include "cpu/align.h"
#include "cpu/element.h"
#include "cpu/expert_stack.h"
#include "cpu/phases.h"
#include "ffi/contract.h"
#include "ffi/handlers.h"

namespace jax_marlin_moe {
namespace {

constexpr int kGateChunks = 4;    // most chunks of gate columns of a work item, and of up columns
constexpr int kDownChunks = 8;    // most column chunks of a work item of the down matrix
constexpr int kSumColumns = 512;  // most columns of a work item of the final sum

// Most float32 results of the down matrix that wait for the final sum: tokens beyond go in another pass.
constexpr int64_t kMaxWaiting = int64_t{1} << 24;

struct Block {
  const uint16_t* x;      // [slots / slots_per_row, hidden]
  int64_t slots_per_row;  // consecutive slots that read one row of x: top_k, or 1
  cpu::Element type;
  const cpu::ExpertStack* gate_up;
  const cpu::ExpertStack* down;
  const float* topk_weights;  // [tokens, top_k]
  cpu::Routing routing;
  int64_t top_k;
  const cpu::Activation* activation;
  const float* activation_parameters;
  uint16_t* y;  // [tokens, down's columns]

  int64_t tokens() const { return routing.slots / top_k; }
  int64_t inner() const { return down->k(); }
  int halves() const { return activation->gated ? 2 : 1; }
  // Columns of gate, and of up: inner, or more where gate_up is padded to whole chunks and down to whole tiles.
  int64_t half() const { return gate_up->n() / halves(); }
};

// Rows in expert order, without padding.
cpu::RowGroups GroupByExpert(const Block& block) {
  const int64_t slots = block.routing.slots;
  std::vector<int32_t> sorted(static_cast<size_t>(slots));
  std::vector<int32_t> experts(static_cast<size_t>(slots));
  int32_t count = 0;
  cpu::AlignBlocks(block.routing, 1, {sorted.data(), slots, experts.data(), &count});
  return cpu::GroupRows(sorted.data(), count, experts.data(), 1, slots, block.down->experts(), cpu::kPanelRows);
}

// Activated columns [begin, end) of one group's rows, rounded to x's type, into `out` [rows, inner]. One
// panel has both halves of the columns, each with the whole chunks around it: up need not begin at a chunk.
void GateUpItem(const Block& block, const cpu::RowGroups& rows, const cpu::RowGroup& group, int64_t begin, int64_t end,
                uint16_t* out) {
  static_assert(2 * (kGateChunks + 1) <= cpu::kPanelChunks);
  const uint16_t* inputs[cpu::kPanelRows];
  for (int r = 0; r < group.count; ++r) {
    inputs[r] = block.x + rows.slots[static_cast<size_t>(group.first + r)] / block.slots_per_row * block.gate_up->k();
  }
  alignas(64) float product[cpu::kPanelRows * 2 * (kGateChunks + 1) * cpu::kChunk];
  cpu::Panel panel;
  panel.x = inputs;
  panel.x_type = block.type;
  panel.rows = group.count;
  panel.chunks = 0;
  panel.out = product;
  const float* halves[2] = {};  // column `begin` of gate and of up in the first row
  for (int half = 0; half < block.halves(); ++half) {
    const int64_t first = half * block.half() + begin;
    const int64_t last = half * block.half() + end - 1;
    halves[half] = product + panel.chunks * cpu::kChunk + first % cpu::kChunk;
    for (int64_t chunk = first / cpu::kChunk; chunk <= last / cpu::kChunk; ++chunk) {
      panel.chunk[panel.chunks++] = chunk;
    }
  }
  cpu::MultiplyExpert(*block.gate_up, group.expert, panel);
  const int64_t width = static_cast<int64_t>(panel.chunks) * cpu::kChunk;
  for (int r = 0; r < group.count; ++r) {
    float activated[kGateChunks * cpu::kChunk];
    const float* up = block.activation->gated ? halves[1] + r * width : nullptr;
    block.activation->apply(halves[0] + r * width, up, end - begin, block.activation_parameters, activated);
    cpu::RoundRow(activated, end - begin, block.type, out + (group.first + r) * block.inner() + begin);
  }
}

// A range of columns of the down matrix for one group's rows, times the router weights, into row `slot` of
// out.
void DownItem(const Block& block, const cpu::RowGroups& rows, const cpu::RowGroup& group, const uint16_t* activated,
              int64_t first_chunk, int64_t end_chunk, float* out) {
  const uint16_t* inputs[cpu::kPanelRows];
  for (int r = 0; r < group.count; ++r) inputs[r] = activated + (group.first + r) * block.inner();
  alignas(64) float product[cpu::kPanelRows * kDownChunks * cpu::kChunk];
  cpu::Panel panel;
  panel.x = inputs;
  panel.x_type = block.type;
  panel.rows = group.count;
  panel.chunks = static_cast<int>(end_chunk - first_chunk);
  for (int i = 0; i < panel.chunks; ++i) panel.chunk[i] = first_chunk + i;
  panel.out = product;
  cpu::MultiplyExpert(*block.down, group.expert, panel);
  const int64_t width = static_cast<int64_t>(panel.chunks) * cpu::kChunk;
  for (int r = 0; r < group.count; ++r) {
    const int64_t slot = rows.slots[static_cast<size_t>(group.first + r)];
    const float weight = block.topk_weights[slot];
    float* row = out + slot * block.down->n() + first_chunk * cpu::kChunk;
    for (int64_t c = 0; c < width; ++c) row[c] = product[r * width + c] * weight;
  }
}

// Columns [begin, end) of one token: its slots in ascending order, then the one rounding.
void SumItem(const Block& block, const std::vector<uint8_t>& scheduled, const float* products, int64_t token,
             int64_t begin, int64_t end) {
  float sum[kSumColumns] = {};
  for (int64_t slot = token * block.top_k; slot < (token + 1) * block.top_k; ++slot) {
    if (!scheduled[static_cast<size_t>(slot)]) continue;
    const float* row = products + slot * block.down->n() + begin;
    for (int64_t c = 0; c < end - begin; ++c) sum[c] += row[c];
  }
  cpu::RoundRow(sum, end - begin, block.type, block.y + token * block.down->n() + begin);
}

void RunBlock(ffi::ThreadPool& pool, const Block& block) {
  const int64_t columns = block.down->n();
  const int64_t inner = block.inner();
  const cpu::RowGroups rows = GroupByExpert(block);
  const int64_t groups = static_cast<int64_t>(rows.groups.size());
  std::vector<uint8_t> scheduled(static_cast<size_t>(block.routing.slots), 0);
  for (int32_t slot : rows.slots) scheduled[static_cast<size_t>(slot)] = 1;
  const std::unique_ptr<uint16_t[]> activated(new uint16_t[rows.slots.size() * static_cast<size_t>(inner)]);
  const std::unique_ptr<float[]> products(
      new float[static_cast<size_t>(block.routing.slots) * static_cast<size_t>(columns)]);

  // Small enough items keep every thread busy to the end of a phase; larger ones expand x less often.
  auto item_chunks = [&](int64_t chunks, int64_t most) {
    return std::clamp<int64_t>(groups * chunks / (8 * cpu::TeamSize(pool)), 1, most);
  };
  const int64_t gate_width = item_chunks(cpu::CeilDiv(inner, cpu::kChunk), kGateChunks) * cpu::kChunk;
  const int64_t gate_splits = cpu::CeilDiv(inner, gate_width);
  const int64_t down_all = columns / cpu::kChunk;
  const int64_t down_chunks = item_chunks(down_all, kDownChunks);
  const int64_t down_splits = cpu::CeilDiv(down_all, down_chunks);
  const int64_t sum_splits = cpu::CeilDiv(columns, kSumColumns);

  auto gate_up = [&](int64_t item) {
    const int64_t begin = item % gate_splits * gate_width;
    GateUpItem(block, rows, rows.groups[static_cast<size_t>(item / gate_splits)], begin,
               std::min(begin + gate_width, inner), activated.get());
  };
  auto down = [&](int64_t item) {
    const int64_t first = item % down_splits * down_chunks;
    DownItem(block, rows, rows.groups[static_cast<size_t>(item / down_splits)], activated.get(), first,
             std::min(first + down_chunks, down_all), products.get());
  };
  auto sum = [&](int64_t item) {
    const int64_t begin = item % sum_splits * kSumColumns;
    SumItem(block, scheduled, products.get(), item / sum_splits, begin,
            std::min<int64_t>(begin + kSumColumns, columns));
  };
  cpu::RunPhases(pool,
                 {{groups * gate_splits, gate_up}, {groups * down_splits, down}, {block.tokens() * sum_splits, sum}});
}

ffi::Error FusedMoeImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate_up_packed,
                        ffi::AnyBuffer gate_up_scales, ffi::AnyBuffer gate_up_zeros,
                        ffi::AnyBuffer gate_up_global_scales, ffi::AnyBuffer gate_up_bias, ffi::AnyBuffer down_packed,
                        ffi::AnyBuffer down_scales, ffi::AnyBuffer down_zeros, ffi::AnyBuffer down_global_scales,
                        ffi::AnyBuffer down_bias, ffi::AnyBuffer topk_weights, ffi::AnyBuffer topk_ids,
                        ffi::AnyBuffer expert_map, ffi::Result<ffi::AnyBuffer> y, std::string_view activation,
                        ffi::Span<const float> activation_parameters, std::string_view gate_up_code,
                        std::string_view gate_up_scale, std::string_view gate_up_zeros_type, int64_t gate_up_zero_point,
                        int64_t gate_up_group_size, std::string_view down_code, std::string_view down_scale,
                        std::string_view down_zeros_type, int64_t down_zero_point, int64_t down_group_size) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  Contract contract("fused_moe");
  const int64_t x_rows = Extent(x, 0);
  const int64_t hidden = Extent(x, 1);
  const int64_t inner = Extent(down_packed, 1) * cpu::kTileK;
  const int64_t tokens = Extent(topk_ids, 0);
  const int64_t top_k = Extent(topk_ids, 1);
  Block block;
  block.activation = cpu::FindActivation(activation);
  contract.Require(block.activation != nullptr,
                   "activation is '" + std::string(activation) + "'; there are: " + cpu::ActivationNames());
  if (!contract.ok()) return contract.ToError();
  contract.Require(static_cast<int>(activation_parameters.size()) == block.activation->parameters,
                   "activation '" + std::string(activation) + "' has " + std::to_string(activation_parameters.size()) +
                       " parameters; it takes " + std::to_string(block.activation->parameters));
  block.type = cpu::CheckElement(contract, x, "x");
  contract.HasExtents(x, "x", {x_rows, hidden});
  const cpu::ExpertStack gate_up(
      contract, "gate_up ", hidden,
      {gate_up_packed, gate_up_scales, gate_up_zeros, gate_up_global_scales, gate_up_bias},
      {gate_up_code, gate_up_scale, gate_up_zeros_type, gate_up_zero_point, gate_up_group_size});
  const cpu::ExpertStack down(contract, "down ", inner,
                              {down_packed, down_scales, down_zeros, down_global_scales, down_bias},
                              {down_code, down_scale, down_zeros_type, down_zero_point, down_group_size});
  if (!contract.ok()) return contract.ToError();
  block.gate_up = &gate_up;
  block.down = &down;
  // Columns come in chunks of 64 and rows in tiles of 16, so one side may have the longer padding of the same extent.
  contract.Require(gate_up.n() % block.halves() == 0 && block.half() >= inner && block.half() - inner < cpu::kChunk,
                   "gate_up has " + std::to_string(gate_up.n()) + " columns, which are not " +
                       std::to_string(block.halves()) + " times the " + std::to_string(inner) + " rows of down");
  contract.Require(down.n() >= hidden && down.n() - hidden < cpu::kChunk,
                   "down has " + std::to_string(down.n()) + " columns, x has " + std::to_string(hidden));
  contract.Require(gate_up.experts() == down.experts(), "gate_up and down differ in their number of experts");
  contract.Require(top_k >= 1 && tokens <= kMost && top_k <= kMost && tokens * top_k <= kMost,
                   "topk_ids has " + std::to_string(tokens) + " rows and " + std::to_string(top_k) + " columns");
  if (!contract.ok()) return contract.ToError();
  contract.Require(x_rows == tokens || x_rows == tokens * top_k,
                   "x has " + std::to_string(x_rows) + " rows, neither one per token (" + std::to_string(tokens) +
                       ") nor one per slot (" + std::to_string(tokens * top_k) + ")");
  contract.HasShape(topk_weights, "topk_weights", ffi::DataType::F32, {tokens, top_k});
  contract.HasShape(topk_ids, "topk_ids", ffi::DataType::S32, {tokens, top_k});
  contract.HasShape(expert_map, "expert_map", ffi::DataType::S32, {Extent(expert_map, 0)});
  contract.HasShape(*y, "y", x.element_type(), {tokens, down.n()});
  if (!contract.ok()) return contract.ToError();

  const bool mapped = !Contract::IsAbsent(expert_map);
  block.activation_parameters = activation_parameters.begin();
  block.top_k = top_k;
  block.slots_per_row = x_rows == tokens ? top_k : 1;
  block.routing.num_experts = mapped ? Extent(expert_map, 0) : down.experts();
  block.routing.expert_map = mapped ? static_cast<const int32_t*>(expert_map.untyped_data()) : nullptr;
  const int64_t pass_tokens = std::max<int64_t>(1, kMaxWaiting / (top_k * down.n()));
  for (int64_t first = 0; first < tokens; first += pass_tokens) {
    block.x = static_cast<const uint16_t*>(x.untyped_data()) + first * top_k / block.slots_per_row * hidden;
    block.topk_weights = static_cast<const float*>(topk_weights.untyped_data()) + first * top_k;
    block.routing.topk_ids = static_cast<const int32_t*>(topk_ids.untyped_data()) + first * top_k;
    block.routing.slots = std::min(pass_tokens, tokens - first) * top_k;
    block.y = static_cast<uint16_t*>(y->untyped_data()) + first * down.n();
    RunBlock(pool, block);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_Error* FusedMoeCpu(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, FusedMoeImpl,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()  // x [M, H] or [M * top_k, H] bf16 or f16, H as packed
                             .Arg<ffi::AnyBuffer>()  // gate_up packed, and so on: expert_stack.h
                             .Arg<ffi::AnyBuffer>()  // gate_up scales
                             .Arg<ffi::AnyBuffer>()  // gate_up zeros
                             .Arg<ffi::AnyBuffer>()  // gate_up global_scales
                             .Arg<ffi::AnyBuffer>()  // gate_up bias
                             .Arg<ffi::AnyBuffer>()  // down packed
                             .Arg<ffi::AnyBuffer>()  // down scales
                             .Arg<ffi::AnyBuffer>()  // down zeros
                             .Arg<ffi::AnyBuffer>()  // down global_scales
                             .Arg<ffi::AnyBuffer>()  // down bias
                             .Arg<ffi::AnyBuffer>()  // topk_weights [M, top_k] f32
                             .Arg<ffi::AnyBuffer>()  // topk_ids [M, top_k]
                             .Arg<ffi::AnyBuffer>()  // expert_map [global experts] or [0]
                             .Ret<ffi::AnyBuffer>()  // y [M, N of down] of x's type
                             .Attr<std::string_view>("activation")
                             .Attr<ffi::Span<const float>>("activation_parameters")
                             .Attr<std::string_view>("gate_up_code")
                             .Attr<std::string_view>("gate_up_scale")
                             .Attr<std::string_view>("gate_up_zeros")
                             .Attr<int64_t>("gate_up_zero_point")
                             .Attr<int64_t>("gate_up_group_size")
                             .Attr<std::string_view>("down_code")
                             .Attr<std::string_view>("down_scale")
                             .Attr<std::string_view>("down_zeros")
                             .Attr<int64_t>("down_zero_point")
                             .Attr<int64_t>("down_group_size"));
  return (*handler)(frame);
}

}  // namespace jax_marlin_moe
