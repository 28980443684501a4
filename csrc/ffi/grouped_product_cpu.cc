// The CPU handler of the grouped product, either way round: decodes, checks, and calls.
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "cpu/grouped_product.h"
#include "ffi/contract.h"
#include "ffi/cpu_op.h"
#include "ffi/matrix_operands.h"
#include "ffi/xla_workers.h"

namespace jax_marlin_moe {
namespace {

ffi::Error GroupedProductImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer scales,
                              ffi::AnyBuffer zeros, ffi::AnyBuffer global_scales, ffi::AnyBuffer bias,
                              ffi::AnyBuffer experts, ffi::Result<ffi::AnyBuffer> y, bool transposed,
                              int64_t slots_per_row, std::string_view code, std::string_view scale,
                              std::string_view zeros_type, int64_t zero_point, int64_t group_size) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  Contract contract("grouped_product");
  const int64_t rows = contract.Extent(x, "x", 0);
  const int64_t inputs = contract.Extent(x, "x", 1);
  const int64_t outputs = contract.Extent(*y, "y", 1);
  contract.Require(slots_per_row >= 1 && slots_per_row <= kMost, "slots_per_row is " + std::to_string(slots_per_row));
  if (!contract.ok()) return contract.ToError();
  const int64_t slots = contract.Product("the number of slots", {rows, slots_per_row});
  contract.Require(slots <= kMost, "there are " + std::to_string(slots) + " slots, more than int32 counts");
  const cpu::Element type = CheckElement(contract, x, "x");
  contract.HasExtents(x, "x", {rows, inputs});
  const cpu::ExpertStack stack =
      CheckMatrix(contract, "", transposed ? outputs : inputs, {packed, scales, zeros, global_scales, bias},
                  {code, scale, zeros_type, zero_point, group_size});
  contract.Require(Contract::IsAbsent(bias), "there is a bias, which this product does not add");
  contract.HasShape(experts, "experts", ffi::DataType::S32, {slots});
  contract.HasDtype(*y, "y", {x.element_type(), ffi::DataType::F32});
  if (!contract.ok()) return contract.ToError();
  contract.HasExtents(x, "x", {rows, transposed ? stack.n() : stack.k()});
  contract.HasExtents(*y, "y", {slots, transposed ? stack.k() : stack.n()});
  contract.Product("the size of y", {slots, outputs});
  if (!contract.ok()) return contract.ToError();

  cpu::GroupedProduct product;
  product.x = static_cast<const uint16_t*>(x.untyped_data());
  product.type = type;
  product.slots_per_row = slots_per_row;
  product.slots = slots;
  product.stack = &stack;
  product.transposed = transposed;
  product.experts = static_cast<const int32_t*>(experts.untyped_data());
  product.y = y->untyped_data();
  product.float_results = y->element_type() == ffi::DataType::F32;
  XlaWorkers workers(pool);
  return contract.Run([&] { cpu::RunGroupedProduct(workers, product); });
}

XLA_FFI_Error* HandleGroupedProduct(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, GroupedProductImpl,
                         ffi::Ffi::Bind()
                             .Ctx<ffi::ThreadPool>()
                             .Arg<ffi::AnyBuffer>()  // x [rows, K], or [rows, N] if transposed; bf16 or f16
                             .Arg<ffi::AnyBuffer>()  // packed, and so on: matrix_operands.h
                             .Arg<ffi::AnyBuffer>()  // scales
                             .Arg<ffi::AnyBuffer>()  // zeros
                             .Arg<ffi::AnyBuffer>()  // global_scales
                             .Arg<ffi::AnyBuffer>()  // bias [0]
                             .Arg<ffi::AnyBuffer>()  // experts [rows * slots_per_row] s32
                             .Ret<ffi::AnyBuffer>()  // y [rows * slots_per_row, N], or K if transposed; x's type or f32
                             .Attr<bool>("transposed")
                             .Attr<int64_t>("slots_per_row")
                             .Attr<std::string_view>("code")
                             .Attr<std::string_view>("scale")
                             .Attr<std::string_view>("zeros")
                             .Attr<int64_t>("zero_point")
                             .Attr<int64_t>("group_size"));
  return (*handler)(frame);
}

const CpuOp kGroupedProductOp("grouped_product", 1, HandleGroupedProduct);

}  // namespace
}  // namespace jax_marlin_moe
