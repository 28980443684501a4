// The handlers of CUDA: one pair for every op, as each is a compiled program (cuda_program.h).
#ifndef JAX_MARLIN_MOE_FFI_CUDA_HANDLERS_H_
#define JAX_MARLIN_MOE_FFI_CUDA_HANDLERS_H_

#include "xla/ffi/api/c_api.h"

namespace jax_marlin_moe {

// XLA's macros define handlers with C linkage; the module's hidden visibility keeps the names private.
extern "C" {
XLA_FFI_Error* CudaInitialize(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* CudaExecute(XLA_FFI_CallFrame* frame);
}

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_CUDA_HANDLERS_H_
