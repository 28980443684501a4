// The quantised matrices of all experts as a handler receives them, checked, and a view of each expert.
#ifndef JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_
#define JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_

#include <cstdint>
#include <string>

#include "cpu/gemm.h"
#include "ffi/contract.h"

namespace jax_marlin_moe::cpu {

// The element type of a BF16 or F16 buffer; `contract` fails for any other.
Element CheckElement(Contract& contract, const ffi::AnyBuffer& buffer, const char* name);

class ExpertStack {
 public:
  // Checks the four operands of one stack against each other and against k. `prefix` names them in messages.
  ExpertStack(Contract& contract, const std::string& prefix, int64_t k, const ffi::AnyBuffer& packed,
              const ffi::AnyBuffer& scales, const ffi::AnyBuffer& zeros, const ffi::AnyBuffer& bias);

  int64_t experts() const { return experts_; }
  int64_t k() const { return matrix_.k; }
  int64_t n() const { return matrix_.n; }

  ExpertMatrix Expert(int64_t expert) const;
  const float* Bias(int64_t expert) const { return bias_ == nullptr ? nullptr : bias_ + expert * matrix_.n; }

 private:
  int64_t experts_ = 0;
  ExpertMatrix matrix_ = {};  // of expert 0
  const float* bias_ = nullptr;
};

// Computes `panel` with the matrix of one expert, which it fills in, and adds the expert's bias.
void MultiplyExpert(const ExpertStack& stack, int64_t expert, Panel panel);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_
