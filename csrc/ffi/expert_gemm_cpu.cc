// The CPU handler of expert_gemm, which is that of linear too: decodes, checks, and calls.
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "cpu/align.h"
#include "cpu/dispatches.h"
#include "cpu/grouped_gemm.h"
#include "cpu/scratch.h"
#include "ffi/contract.h"
#include "ffi/cpu_op.h"
#include "ffi/matrix_operands.h"
#include "ffi/xla_workers.h"

namespace jax_marlin_moe {
namespace {

ffi::Error ExpertGemmImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer scales,
                          ffi::AnyBuffer zeros, ffi::AnyBuffer global_scales, ffi::AnyBuffer bias,
                          ffi::AnyBuffer dispatches, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> skipped,
                          std::string_view code, std::string_view scale, std::string_view zeros_type,
                          int64_t zero_point, int64_t group_size) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  Contract contract("expert_gemm");
  const int64_t rows = contract.Extent(x, "x", 0);
  const int64_t k = contract.Extent(x, "x", 1);
  const int64_t count = contract.Extent(dispatches, "dispatches", 0);
  const int64_t result_rows = contract.Extent(*y, "y", 0);
  contract.Require(rows <= kMost && result_rows <= kMost && count <= kMost,
                   "there are " + std::to_string(rows) + " rows of x, " + std::to_string(result_rows) +
                       " of the result and " + std::to_string(count) + " dispatches, more than int32 counts");
  if (!contract.ok()) return contract.ToError();
  const cpu::Element x_type = CheckElement(contract, x, "x");
  contract.HasExtents(x, "x", {rows, k});
  const cpu::ExpertStack stack = CheckMatrix(contract, "", k, {packed, scales, zeros, global_scales, bias},
                                             {code, scale, zeros_type, zero_point, group_size});
  contract.HasShape(dispatches, "dispatches", ffi::DataType::S32, {count, 4});
  contract.HasShape(*skipped, "skipped", ffi::DataType::S32, {1});
  if (!contract.ok()) return contract.ToError();
  contract.HasShape(*y, "y", x.element_type(), {result_rows, stack.n()});
  contract.Product("the size of y", {result_rows, stack.n()});
  if (!contract.ok()) return contract.ToError();

  XlaWorkers workers(pool);
  return contract.Run([&] {
    const auto size = static_cast<size_t>(result_rows);
    cpu::Scratch<int32_t> experts(size), sources(size), sorted(size), sorted_experts(size);
    *static_cast<int32_t*>(skipped->untyped_data()) = cpu::ResolveDispatches(
        {static_cast<const int32_t*>(dispatches.untyped_data()), count, stack.experts, rows, result_rows},
        experts.data(), sources.data());
    int32_t length = 0;
    cpu::AlignBlocks({experts.data(), result_rows, stack.experts, nullptr}, 1,
                     {sorted.data(), result_rows, sorted_experts.data(), &length});
    cpu::GroupedGemm gemm;
    gemm.x = static_cast<const uint16_t*>(x.untyped_data());
    gemm.type = x_type;
    gemm.slots = result_rows;
    gemm.stack = &stack;
    gemm.rows = sources.data();
    gemm.sorted_token_ids = sorted.data();
    gemm.length = length;
    gemm.expert_ids = sorted_experts.data();
    gemm.block_size = 1;
    gemm.y = static_cast<uint16_t*>(y->untyped_data());
    cpu::RunGroupedGemm(workers, gemm);
  });
}

XLA_FFI_Error* HandleExpertGemm(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, ExpertGemmImpl,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()  // x [M, K] bf16 or f16
                             .Arg<ffi::AnyBuffer>()  // packed, and so on: matrix_operands.h
                             .Arg<ffi::AnyBuffer>()  // scales
                             .Arg<ffi::AnyBuffer>()  // zeros
                             .Arg<ffi::AnyBuffer>()  // global_scales
                             .Arg<ffi::AnyBuffer>()  // bias
                             .Arg<ffi::AnyBuffer>()  // dispatches [D, 4]
                             .Ret<ffi::AnyBuffer>()  // y [rows of the result, N] of x's type
                             .Ret<ffi::AnyBuffer>()  // skipped [1]
                             .Attr<std::string_view>("code")
                             .Attr<std::string_view>("scale")
                             .Attr<std::string_view>("zeros")
                             .Attr<int64_t>("zero_point")
                             .Attr<int64_t>("group_size"));
  return (*handler)(frame);
}

const CpuOp kExpertGemmOp("expert_gemm", 1, HandleExpertGemm);

}  // namespace
}  // namespace jax_marlin_moe
