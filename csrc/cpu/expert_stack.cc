// Checks and views of stacked expert matrices.
#include "cpu/expert_stack.h"

namespace jax_marlin_moe::cpu {

Element CheckElement(Contract& contract, const ffi::AnyBuffer& buffer, const char* name) {
  contract.HasDtype(buffer, name, {ffi::DataType::BF16, ffi::DataType::F16});
  return buffer.element_type() == ffi::DataType::F16 ? Element::kF16 : Element::kBf16;
}

ExpertStack::ExpertStack(Contract& contract, const std::string& prefix, int64_t k, const ffi::AnyBuffer& packed,
                         const ffi::AnyBuffer& scales, const ffi::AnyBuffer& zeros, const ffi::AnyBuffer& bias) {
  const int64_t experts = Extent(packed, 0);
  const int64_t words = Extent(packed, 2);
  const int64_t n = words / 2;
  const int64_t groups = Extent(scales, 1);
  contract.Require(k >= kTileK && k % kTileK == 0,
                   prefix + "the contraction extent is " + std::to_string(k) + ", not a multiple of 16");
  contract.Require(words >= kTileWords && words % kTileWords == 0,
                   prefix + "packed has " + std::to_string(words) + " words a row, not a multiple of 128");
  contract.HasShape(packed, (prefix + "packed").c_str(), ffi::DataType::S32, {experts, k / kTileK, words});
  contract.Require(groups >= 1 && k % groups == 0 && k / groups % kTileK == 0,
                   prefix + "scales have " + std::to_string(groups) + " groups, which do not divide " +
                       std::to_string(k) + " into multiples of 16");
  matrix_.scale_type = CheckElement(contract, scales, (prefix + "scales").c_str());
  contract.HasExtents(scales, (prefix + "scales").c_str(), {experts, groups, n});
  contract.HasShapeOrIsAbsent(zeros, (prefix + "zeros").c_str(), ffi::DataType::S32, {experts, groups, n / 8});
  contract.HasShapeOrIsAbsent(bias, (prefix + "bias").c_str(), ffi::DataType::F32, {experts, n});
  if (!contract.ok()) return;

  experts_ = experts;
  matrix_.packed = static_cast<const int32_t*>(packed.untyped_data());
  matrix_.scales = static_cast<const uint16_t*>(scales.untyped_data());
  if (!Contract::IsAbsent(zeros)) matrix_.zeros = static_cast<const int32_t*>(zeros.untyped_data());
  matrix_.k = k;
  matrix_.n = n;
  matrix_.groups = groups;
  if (!Contract::IsAbsent(bias)) bias_ = static_cast<const float*>(bias.untyped_data());
}

ExpertMatrix ExpertStack::Expert(int64_t expert) const {
  ExpertMatrix matrix = matrix_;
  matrix.packed += expert * (matrix.k / kTileK) * matrix.n * 2;
  matrix.scales += expert * matrix.groups * matrix.n;
  if (matrix.zeros != nullptr) matrix.zeros += expert * matrix.groups * (matrix.n / 8);
  return matrix;
}

void MultiplyExpert(const ExpertStack& stack, int64_t expert, Panel panel) {
  panel.weight = stack.Expert(expert);
  ActivePanelKernel()(panel);
  const float* bias = stack.Bias(expert);
  if (bias == nullptr) return;
  float* out = panel.out;
  for (int r = 0; r < panel.rows; ++r) {
    for (int i = 0; i < panel.chunks; ++i, out += kChunk) {
      const float* chunk_bias = bias + panel.chunk[i] * kChunk;
      for (int c = 0; c < kChunk; ++c) out[c] += chunk_bias[c];
    }
  }
}

}  // namespace jax_marlin_moe::cpu
