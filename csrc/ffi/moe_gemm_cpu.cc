// The CPU handler of moe_gemm: y[slot] = x[slot / top_k] @ W[expert of slot] (+ bias, * router weight).
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/align.h"
#include "cpu/element.h"
#include "cpu/expert_stack.h"
#include "cpu/phases.h"
#include "ffi/contract.h"
#include "ffi/handlers.h"

namespace jax_marlin_moe {
namespace {

constexpr int kItemChunks = 8;  // most column chunks of a work item

ffi::Error MoeGemmImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer scales,
                       ffi::AnyBuffer zeros, ffi::AnyBuffer global_scales, ffi::AnyBuffer bias,
                       ffi::AnyBuffer topk_weights, ffi::AnyBuffer sorted_token_ids, ffi::AnyBuffer expert_ids,
                       ffi::AnyBuffer num_tokens_post_padded, ffi::Result<ffi::AnyBuffer> y, int64_t top_k,
                       int64_t block_size, bool mul_topk_weights, std::string_view code, std::string_view scale,
                       std::string_view zeros_type, int64_t zero_point, int64_t group_size) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  Contract contract("moe_gemm");
  const int64_t tokens = Extent(x, 0);
  const int64_t k = Extent(x, 1);
  const int64_t length = Extent(sorted_token_ids, 0);
  contract.Require(top_k >= 1 && top_k <= kMost, "top_k is " + std::to_string(top_k));
  contract.Require(block_size >= 1, "block_size is " + std::to_string(block_size));
  contract.Require(tokens <= kMost, "x has " + std::to_string(tokens) + " rows");
  if (!contract.ok()) return contract.ToError();
  const int64_t slots = tokens * top_k;
  contract.Require(slots <= kMost, "there are " + std::to_string(slots) + " slots, more than int32 counts");
  const cpu::Element x_type = cpu::CheckElement(contract, x, "x");
  contract.HasExtents(x, "x", {tokens, k});
  const cpu::ExpertStack stack(contract, "", k, {packed, scales, zeros, global_scales, bias},
                               {code, scale, zeros_type, zero_point, group_size});
  contract.HasShapeOrIsAbsent(topk_weights, "topk_weights", ffi::DataType::F32, {slots});
  contract.Require(!mul_topk_weights || slots == 0 || !Contract::IsAbsent(topk_weights),
                   "mul_topk_weights needs topk_weights");
  contract.HasShape(sorted_token_ids, "sorted_token_ids", ffi::DataType::S32, {length});
  if (!contract.ok()) return contract.ToError();
  contract.HasShape(expert_ids, "expert_ids", ffi::DataType::S32, {cpu::CeilDiv(length, block_size)});
  contract.HasShape(num_tokens_post_padded, "num_tokens_post_padded", ffi::DataType::S32, {1});
  contract.HasShape(*y, "y", x.element_type(), {slots, stack.n()});
  if (!contract.ok()) return contract.ToError();

  const auto* x_data = static_cast<const uint16_t*>(x.untyped_data());
  auto* y_data = static_cast<uint16_t*>(y->untyped_data());
  const auto* weights = static_cast<const float*>(topk_weights.untyped_data());
  const int64_t n = stack.n();
  const int64_t padded = *static_cast<const int32_t*>(num_tokens_post_padded.untyped_data());
  const cpu::RowGroups rows = cpu::GroupRows(
      static_cast<const int32_t*>(sorted_token_ids.untyped_data()), std::min(padded, length),
      static_cast<const int32_t*>(expert_ids.untyped_data()), block_size, slots, stack.experts(), cpu::kPanelRows);

  std::vector<bool> scheduled(static_cast<size_t>(slots), false);
  for (int32_t slot : rows.slots) scheduled[static_cast<size_t>(slot)] = true;
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (!scheduled[static_cast<size_t>(slot)]) std::fill_n(y_data + slot * n, n, uint16_t{0});
  }

  const int64_t all_chunks = n / cpu::kChunk;
  const int64_t groups = static_cast<int64_t>(rows.groups.size());
  const int64_t item_chunks = std::clamp<int64_t>(groups * all_chunks / (8 * cpu::TeamSize(pool)), 1, kItemChunks);
  const int64_t splits = cpu::CeilDiv(all_chunks, item_chunks);
  auto run = [&](int64_t item) {
    const cpu::RowGroup& group = rows.groups[static_cast<size_t>(item / splits)];
    const int32_t* group_slots = rows.slots.data() + group.first;
    const int64_t first_chunk = item % splits * item_chunks;
    const uint16_t* inputs[cpu::kPanelRows];
    for (int r = 0; r < group.count; ++r) inputs[r] = x_data + group_slots[r] / top_k * k;
    alignas(64) float product[cpu::kPanelRows * kItemChunks * cpu::kChunk];
    cpu::Panel panel;
    panel.x = inputs;
    panel.x_type = x_type;
    panel.rows = group.count;
    panel.chunks = static_cast<int>(std::min(item_chunks, all_chunks - first_chunk));
    for (int i = 0; i < panel.chunks; ++i) panel.chunk[i] = first_chunk + i;
    panel.out = product;
    cpu::MultiplyExpert(stack, group.expert, panel);
    const int64_t width = static_cast<int64_t>(panel.chunks) * cpu::kChunk;
    for (int r = 0; r < group.count; ++r) {
      float* row = product + r * width;
      if (mul_topk_weights) {
        const float weight = weights[group_slots[r]];
        for (int64_t c = 0; c < width; ++c) row[c] *= weight;
      }
      cpu::RoundRow(row, width, x_type, y_data + group_slots[r] * n + first_chunk * cpu::kChunk);
    }
  };
  cpu::RunPhases(pool, {{groups * splits, run}});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_Error* MoeGemmCpu(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, MoeGemmImpl,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()  // x [M, K] bf16 or f16
                             .Arg<ffi::AnyBuffer>()  // packed, and so on: expert_stack.h
                             .Arg<ffi::AnyBuffer>()  // scales
                             .Arg<ffi::AnyBuffer>()  // zeros
                             .Arg<ffi::AnyBuffer>()  // global_scales
                             .Arg<ffi::AnyBuffer>()  // bias
                             .Arg<ffi::AnyBuffer>()  // topk_weights [M * top_k] f32 or [0]
                             .Arg<ffi::AnyBuffer>()  // sorted_token_ids [P]
                             .Arg<ffi::AnyBuffer>()  // expert_ids [ceil(P / block_size)]
                             .Arg<ffi::AnyBuffer>()  // num_tokens_post_padded [1]
                             .Ret<ffi::AnyBuffer>()  // y [M * top_k, N] of x's type
                             .Attr<int64_t>("top_k")
                             .Attr<int64_t>("block_size")
                             .Attr<bool>("mul_topk_weights")
                             .Attr<std::string_view>("code")
                             .Attr<std::string_view>("scale")
                             .Attr<std::string_view>("zeros")
                             .Attr<int64_t>("zero_point")
                             .Attr<int64_t>("group_size"));
  return (*handler)(frame);
}

}  // namespace jax_marlin_moe
