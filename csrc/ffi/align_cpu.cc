// The CPU handler of moe_align_block_size: decodes, checks, and fills the three outputs.
#include <cstdint>
#include <string>

#include "cpu/align.h"
#include "ffi/contract.h"
#include "ffi/cpu_op.h"

namespace jax_marlin_moe {
namespace {

ffi::Error AlignImpl(ffi::AnyBuffer topk_ids, ffi::AnyBuffer expert_map, ffi::Result<ffi::AnyBuffer> sorted_token_ids,
                     ffi::Result<ffi::AnyBuffer> expert_ids, ffi::Result<ffi::AnyBuffer> num_tokens_post_padded,
                     int64_t block_size, int64_t num_experts) {
  Contract contract("moe_align_block_size");
  contract.Require(block_size >= 1, "block_size is " + std::to_string(block_size));
  contract.Require(num_experts >= 1, "num_experts is " + std::to_string(num_experts));
  const int64_t tokens = contract.Extent(topk_ids, "topk_ids", 0);
  const int64_t top_k = contract.Extent(topk_ids, "topk_ids", 1);
  const int64_t slots = contract.Product("the number of slots", {tokens, top_k});
  contract.HasShape(topk_ids, "topk_ids", ffi::DataType::S32, {tokens, top_k});
  contract.HasShapeOrIsAbsent(expert_map, "expert_map", ffi::DataType::S32, {num_experts});
  if (!contract.ok()) return contract.ToError();

  cpu::Routing routing;
  routing.topk_ids = static_cast<const int32_t*>(topk_ids.untyped_data());
  routing.slots = slots;
  routing.num_experts = num_experts;
  routing.expert_map =
      Contract::IsAbsent(expert_map) ? nullptr : static_cast<const int32_t*>(expert_map.untyped_data());
  const int64_t length = cpu::AlignedLength(routing.slots, num_experts, block_size);
  contract.Require(length >= 0, std::to_string(routing.slots) + " slots in blocks of " + std::to_string(block_size) +
                                    " for " + std::to_string(num_experts) +
                                    " experts have an aligned length that does not fit in int32");
  if (!contract.ok()) return contract.ToError();
  contract.HasShape(*sorted_token_ids, "sorted_token_ids", ffi::DataType::S32, {length});
  contract.HasShape(*expert_ids, "expert_ids", ffi::DataType::S32, {cpu::CeilDiv(length, block_size)});
  contract.HasShape(*num_tokens_post_padded, "num_tokens_post_padded", ffi::DataType::S32, {1});
  if (!contract.ok()) return contract.ToError();

  cpu::Alignment alignment;
  alignment.sorted_token_ids = static_cast<int32_t*>(sorted_token_ids->untyped_data());
  alignment.length = length;
  alignment.expert_ids = static_cast<int32_t*>(expert_ids->untyped_data());
  alignment.num_tokens_post_padded = static_cast<int32_t*>(num_tokens_post_padded->untyped_data());
  return contract.Run([&] { cpu::AlignBlocks(routing, block_size, alignment); });
}

XLA_FFI_Error* HandleAlign(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, AlignImpl,
                         ffi::Ffi::Bind()
                             .Arg<ffi::AnyBuffer>()  // topk_ids [T, top_k]
                             .Arg<ffi::AnyBuffer>()  // expert_map [num_experts] or [0]
                             .Ret<ffi::AnyBuffer>()  // sorted_token_ids [P]
                             .Ret<ffi::AnyBuffer>()  // expert_ids [ceil(P / block_size)]
                             .Ret<ffi::AnyBuffer>()  // num_tokens_post_padded [1]
                             .Attr<int64_t>("block_size")
                             .Attr<int64_t>("num_experts"));
  return (*handler)(frame);
}

const CpuOp kAlignOp("moe_align_block_size", 1, HandleAlign);

}  // namespace
}  // namespace jax_marlin_moe
