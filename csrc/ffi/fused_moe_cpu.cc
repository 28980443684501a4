// The CPU handler of a whole expert block: decodes, checks, and calls.
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "cpu/expert_block.h"
#include "ffi/block_checks.h"
#include "ffi/contract.h"
#include "ffi/cpu_op.h"
#include "ffi/matrix_operands.h"
#include "ffi/xla_workers.h"

namespace jax_marlin_moe {
namespace {

ffi::Error FusedMoeImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate_up_packed,
                        ffi::AnyBuffer gate_up_scales, ffi::AnyBuffer gate_up_zeros,
                        ffi::AnyBuffer gate_up_global_scales, ffi::AnyBuffer gate_up_bias, ffi::AnyBuffer down_packed,
                        ffi::AnyBuffer down_scales, ffi::AnyBuffer down_zeros, ffi::AnyBuffer down_global_scales,
                        ffi::AnyBuffer down_bias, ffi::AnyBuffer topk_weights, ffi::AnyBuffer topk_ids,
                        ffi::AnyBuffer expert_map, ffi::AnyBuffer x_scale, ffi::AnyBuffer intermediate_scales,
                        ffi::Result<ffi::AnyBuffer> y, std::string_view activation,
                        ffi::Span<const float> activation_parameters, std::string_view intermediate,
                        std::string_view gate_up_code, std::string_view gate_up_scale,
                        std::string_view gate_up_zeros_type, int64_t gate_up_zero_point, int64_t gate_up_group_size,
                        std::string_view down_code, std::string_view down_scale, std::string_view down_zeros_type,
                        int64_t down_zero_point, int64_t down_group_size) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  Contract contract("fused_moe");
  const int64_t x_rows = contract.Extent(x, "x", 0);
  const int64_t hidden = contract.Extent(x, "x", 1);
  const int64_t inner = contract.Extent(down_packed, "down packed", 1) * cpu::kTileK;
  const int64_t tokens = contract.Extent(topk_ids, "topk_ids", 0);
  const int64_t top_k = contract.Extent(topk_ids, "topk_ids", 1);
  const int64_t map_length = contract.Extent(expert_map, "expert_map", 0);
  cpu::ExpertBlock block;
  SetActivation(contract, activation, activation_parameters, block);
  block.intermediate = intermediate == "none" ? nullptr : cpu::FindIntermediateQuantizer(intermediate);
  contract.Require(
      intermediate == "none" || block.intermediate != nullptr,
      "intermediate is " + Quoted(intermediate) + "; there are: none, " + cpu::IntermediateQuantizerNames());
  if (!contract.ok()) return contract.ToError();
  block.type = CheckElement(contract, x, "x");
  contract.HasExtents(x, "x", {x_rows, hidden});
  const cpu::ExpertStack gate_up =
      CheckMatrix(contract, "gate_up ", hidden,
                  {gate_up_packed, gate_up_scales, gate_up_zeros, gate_up_global_scales, gate_up_bias},
                  {gate_up_code, gate_up_scale, gate_up_zeros_type, gate_up_zero_point, gate_up_group_size});
  const cpu::ExpertStack down =
      CheckMatrix(contract, "down ", inner, {down_packed, down_scales, down_zeros, down_global_scales, down_bias},
                  {down_code, down_scale, down_zeros_type, down_zero_point, down_group_size});
  if (!contract.ok()) return contract.ToError();
  block.gate_up = &gate_up;
  block.down = &down;
  CheckMatrices(contract, block, hidden);
  const int64_t slots = contract.Product("the number of slots", {tokens, top_k});
  contract.Require(tokens >= 0 && top_k >= 1 && slots <= kMost,
                   "topk_ids has " + std::to_string(tokens) + " rows and " + std::to_string(top_k) +
                       " columns; there must be at least one column, and no more slots than int32 counts");
  contract.Product("what a token's experts compute", {top_k, inner});
  contract.Product("what a token's experts return", {top_k, down.n()});
  if (!contract.ok()) return contract.ToError();
  contract.Require(x_rows == tokens || x_rows == slots, "x has " + std::to_string(x_rows) +
                                                            " rows, neither one per token (" + std::to_string(tokens) +
                                                            ") nor one per slot (" + std::to_string(slots) + ")");
  contract.HasShape(topk_weights, "topk_weights", ffi::DataType::F32, {tokens, top_k});
  contract.HasShape(topk_ids, "topk_ids", ffi::DataType::S32, {tokens, top_k});
  contract.HasShape(expert_map, "expert_map", ffi::DataType::S32, {map_length});
  contract.HasShapeOrIsAbsent(x_scale, "x_scale", ffi::DataType::F32, {1});
  contract.HasShape(intermediate_scales, "intermediate_scales", ffi::DataType::F32,
                    {block.intermediate == nullptr ? 0 : down.experts});
  contract.HasDtype(*y, "y", {x.element_type(), ffi::DataType::F32});
  contract.HasExtents(*y, "y", {tokens, down.n()});
  if (!contract.ok()) return contract.ToError();

  const bool mapped = !Contract::IsAbsent(expert_map);
  block.top_k = top_k;
  block.slots_per_row = x_rows == tokens ? top_k : 1;
  block.routing.num_experts = mapped ? map_length : down.experts;
  block.routing.expert_map = mapped ? static_cast<const int32_t*>(expert_map.untyped_data()) : nullptr;
  block.routing.topk_ids = static_cast<const int32_t*>(topk_ids.untyped_data());
  block.routing.slots = slots;
  block.x = static_cast<const uint16_t*>(x.untyped_data());
  block.topk_weights = static_cast<const float*>(topk_weights.untyped_data());
  block.x_scale = Contract::IsAbsent(x_scale) ? nullptr : static_cast<const float*>(x_scale.untyped_data());
  block.intermediate_scales = static_cast<const float*>(intermediate_scales.untyped_data());
  block.y = y->untyped_data();
  block.float_result = y->element_type() == ffi::DataType::F32;
  XlaWorkers workers(pool);
  return contract.Run([&] { cpu::RunExpertBlock(workers, block); });
}

XLA_FFI_Error* HandleFusedMoe(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, FusedMoeImpl,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()  // x [M, H] or [M * top_k, H] bf16 or f16, H as packed
                             .Arg<ffi::AnyBuffer>()  // gate_up packed, and so on: matrix_operands.h
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
                             .Arg<ffi::AnyBuffer>()  // x_scale [1] f32 or [0]
                             .Arg<ffi::AnyBuffer>()  // intermediate_scales [E] f32, or [0] where intermediate is "none"
                             .Ret<ffi::AnyBuffer>()  // y [M, N of down] of x's type or f32
                             .Attr<std::string_view>("activation")
                             .Attr<ffi::Span<const float>>("activation_parameters")
                             .Attr<std::string_view>("intermediate")
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

const CpuOp kFusedMoeOp("fused_moe", 2, HandleFusedMoe);

}  // namespace
}  // namespace jax_marlin_moe
