// The quantised matrices of all experts as a handler receives them, checked, and a view of each expert.
#ifndef JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_
#define JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "cpu/gemm.h"
#include "ffi/contract.h"

namespace jax_marlin_moe::cpu {

// The element type of a BF16 or F16 buffer; `contract` fails for any other.
Element CheckElement(Contract& contract, const ffi::AnyBuffer& buffer, const char* name);

// The operands of one matrix, [0] where optional ones are absent.
struct MatrixOperands {
  ffi::AnyBuffer packed;         // [E, K / 16, N * 16 * bits / 32]
  ffi::AnyBuffer scales;         // [E, G, N] floats or bytes
  ffi::AnyBuffer zeros;          // [E, G, N * bits / 32] words, [E, G, N] floats of the scales' type, or [0]
  ffi::AnyBuffer global_scales;  // [E, N / 64] f32 or [0]
  ffi::AnyBuffer bias;           // [E, N] f32 or [0]
};

// The attributes that say what they mean.
struct MatrixFormat {
  std::string_view code;   // int4, int8, e2m1, e4m3
  std::string_view scale;  // float, e4m3, e8m0
  std::string_view zeros;  // none, integer, float
  int64_t zero_point;      // of every group, where zeros is none
  int64_t group_size;      // rows of K that share a scale, but for the last group
};

class ExpertStack {
 public:
  // Checks operands and attributes against each other and against k. `prefix` names them in messages.
  ExpertStack(Contract& contract, const std::string& prefix, int64_t k, const MatrixOperands& operands,
              const MatrixFormat& format);

  int64_t experts() const { return experts_; }
  int64_t k() const { return matrix_.k; }
  int64_t n() const { return matrix_.n; }

  ExpertMatrix Expert(int64_t expert) const;
  const float* GlobalScales(int64_t expert) const {
    return global_scales_ == nullptr ? nullptr : global_scales_ + expert * (matrix_.n / kChunk);
  }
  const float* Bias(int64_t expert) const { return bias_ == nullptr ? nullptr : bias_ + expert * matrix_.n; }

 private:
  int64_t experts_ = 0;
  ExpertMatrix matrix_ = {};  // of expert 0
  int64_t packed_words_ = 0;  // of one expert
  int64_t scale_bytes_ = 0;
  int64_t zero_bytes_ = 0;
  const float* global_scales_ = nullptr;
  const float* bias_ = nullptr;
};

// Computes `panel` with the matrix of one expert, which it fills in, then applies the expert's global scales and adds
// its bias.
void MultiplyExpert(const ExpertStack& stack, int64_t expert, Panel panel);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_EXPERT_STACK_H_
