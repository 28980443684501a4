// The ops with a CPU handler. The file of a handler defines one CpuOp, and the module registers what it finds. All
// these files are one translation unit: what each names is its own.
#ifndef JAX_MARLIN_MOE_FFI_CPU_OP_H_
#define JAX_MARLIN_MOE_FFI_CPU_OP_H_

#include "xla/ffi/api/c_api.h"

namespace jax_marlin_moe {

// Constants of namespace scope only: they link themselves into a list while the module is loaded, and stay.
class CpuOp {
 public:
  // `version` is part of the target's name, which exported programs contain: another one for other operands,
  // attributes or results.
  CpuOp(const char* name, int version, XLA_FFI_Handler* handler)
      : name(name), version(version), handler(handler), next(first_) {
    first_ = this;
  }
  CpuOp(const CpuOp&) = delete;
  CpuOp& operator=(const CpuOp&) = delete;

  static const CpuOp* First() { return first_; }

  const char* const name;
  const int version;
  XLA_FFI_Handler* const handler;
  const CpuOp* const next;

 private:
  static inline const CpuOp* first_ = nullptr;
};

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_CPU_OP_H_
