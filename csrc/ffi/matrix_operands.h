// The operands of a stack of quantised matrices as handlers receive them, and their checks.
#ifndef JAX_MARLIN_MOE_FFI_MATRIX_OPERANDS_H_
#define JAX_MARLIN_MOE_FFI_MATRIX_OPERANDS_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "cpu/expert_stack.h"
#include "ffi/contract.h"

namespace jax_marlin_moe {

// The element type of a BF16 or F16 buffer; `contract` fails for any other.
cpu::Element CheckElement(Contract& contract, const ffi::AnyBuffer& buffer, const char* name);

// The operands of one stack, [0] where optional ones are absent.
struct MatrixOperands {
  ffi::AnyBuffer packed;         // [E, K / 16, N * 16 * bits / 32]
  ffi::AnyBuffer scales;         // [E, G, N] floats or bytes
  ffi::AnyBuffer zeros;          // [E, G, N * bits / 32] words, [E, G, N] floats of the scales' type, or [0]
  ffi::AnyBuffer global_scales;  // [E, N / 64] f32 or [0]
  ffi::AnyBuffer bias;           // [E, N] f32 or [0]
};

// The attributes that say what they mean.
struct MatrixFormat {
  std::string_view code;   // int4, int8, e2m1, bf16, fp16, e4m3
  std::string_view scale;  // float, e4m3, e8m0
  std::string_view zeros;  // none, integer, float
  int64_t zero_point;      // of every group, where zeros is none
  int64_t group_size;      // rows of K that share a scale, but for the last group
};

// The stack that operands and attributes describe, checked against each other and against k; `prefix` names them in
// messages. It may be read only if `contract` is still ok.
cpu::ExpertStack CheckMatrix(Contract& contract, const std::string& prefix, int64_t k, const MatrixOperands& operands,
                             const MatrixFormat& format);

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_MATRIX_OPERANDS_H_
