// The CPU handler of moe_gemm: decodes, checks, and calls.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "cpu/align.h"
#include "cpu/grouped_gemm.h"
#include "ffi/contract.h"
#include "ffi/cpu_op.h"
#include "ffi/matrix_operands.h"
#include "ffi/xla_workers.h"

namespace jax_marlin_moe {
namespace {

ffi::Error MoeGemmImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer scales,
                       ffi::AnyBuffer zeros, ffi::AnyBuffer global_scales, ffi::AnyBuffer bias,
                       ffi::AnyBuffer topk_weights, ffi::AnyBuffer sorted_token_ids, ffi::AnyBuffer expert_ids,
                       ffi::AnyBuffer num_tokens_post_padded, ffi::Result<ffi::AnyBuffer> y, int64_t top_k,
                       int64_t block_size, bool mul_topk_weights, std::string_view code, std::string_view scale,
                       std::string_view zeros_type, int64_t zero_point, int64_t group_size) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  Contract contract("moe_gemm");
  const int64_t tokens = contract.Extent(x, "x", 0);
  const int64_t k = contract.Extent(x, "x", 1);
  const int64_t length = contract.Extent(sorted_token_ids, "sorted_token_ids", 0);
  contract.Require(top_k >= 1 && top_k <= kMost, "top_k is " + std::to_string(top_k));
  contract.Require(block_size >= 1, "block_size is " + std::to_string(block_size));
  if (!contract.ok()) return contract.ToError();
  const int64_t slots = contract.Product("the number of slots", {tokens, top_k});
  contract.Require(slots <= kMost, "there are " + std::to_string(slots) + " slots, more than int32 counts");
  const cpu::Element x_type = CheckElement(contract, x, "x");
  contract.HasExtents(x, "x", {tokens, k});
  const cpu::ExpertStack stack = CheckMatrix(contract, "", k, {packed, scales, zeros, global_scales, bias},
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

  cpu::GroupedGemm gemm;
  gemm.x = static_cast<const uint16_t*>(x.untyped_data());
  gemm.type = x_type;
  gemm.top_k = top_k;
  gemm.slots = slots;
  gemm.stack = &stack;
  gemm.topk_weights = mul_topk_weights ? static_cast<const float*>(topk_weights.untyped_data()) : nullptr;
  gemm.sorted_token_ids = static_cast<const int32_t*>(sorted_token_ids.untyped_data());
  gemm.length = std::min<int64_t>(length, *static_cast<const int32_t*>(num_tokens_post_padded.untyped_data()));
  gemm.expert_ids = static_cast<const int32_t*>(expert_ids.untyped_data());
  gemm.block_size = block_size;
  gemm.y = static_cast<uint16_t*>(y->untyped_data());
  XlaWorkers workers(pool);
  return contract.Run([&] { cpu::RunGroupedGemm(workers, gemm); });
}

XLA_FFI_Error* HandleMoeGemm(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, MoeGemmImpl,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()  // x [M, K] bf16 or f16
                             .Arg<ffi::AnyBuffer>()  // packed, and so on: matrix_operands.h
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

const CpuOp kMoeGemmOp("moe_gemm", 1, HandleMoeGemm);

}  // namespace
}  // namespace jax_marlin_moe
