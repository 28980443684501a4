// Every FFI handler of the module: one per op on the CPU, one pair for all of CUDA. Their operand lists stand beside
// their bindings.
#ifndef JAX_MARLIN_MOE_FFI_HANDLERS_H_
#define JAX_MARLIN_MOE_FFI_HANDLERS_H_

#include "xla/ffi/api/c_api.h"

namespace jax_marlin_moe {

// XLA's macros define handlers with C linkage; the module's hidden visibility keeps the names private.
extern "C" {
XLA_FFI_Error* AlignCpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* MoeGemmCpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* FusedMoeCpu(XLA_FFI_CallFrame* frame);

// Every CUDA op is a compiled program: see cuda_program.h.
XLA_FFI_Error* CudaInitialize(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* CudaExecute(XLA_FFI_CallFrame* frame);
}

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_HANDLERS_H_
