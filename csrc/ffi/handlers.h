// Every FFI handler of the module: one per op on the CPU, one pair for all of CUDA. Their operand lists stand beside
// their bindings.
#ifndef JAX_MARLIN_MOE_FFI_HANDLERS_H_
#define JAX_MARLIN_MOE_FFI_HANDLERS_H_

#include "xla/ffi/api/c_api.h"

// The ops with a CPU handler: X(handler, name of the op). The handlers are declared and registered from this list.
#define JAX_MARLIN_MOE_CPU_OPS(X)     \
  X(AlignCpu, "moe_align_block_size") \
  X(MoeGemmCpu, "moe_gemm")           \
  X(FusedMoeCpu, "fused_moe")

namespace jax_marlin_moe {

// XLA's macros define handlers with C linkage; the module's hidden visibility keeps the names private.
extern "C" {
#define JAX_MARLIN_MOE_DECLARE(handler, op) XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame);
JAX_MARLIN_MOE_CPU_OPS(JAX_MARLIN_MOE_DECLARE)
#undef JAX_MARLIN_MOE_DECLARE

// Every CUDA op is a compiled program: see cuda_program.h.
XLA_FFI_Error* CudaInitialize(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* CudaExecute(XLA_FFI_CallFrame* frame);
}

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_HANDLERS_H_
