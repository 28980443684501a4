// What the handlers of an expert block and of a layer that has one both check.
#ifndef JAX_MARLIN_MOE_FFI_BLOCK_CHECKS_H_
#define JAX_MARLIN_MOE_FFI_BLOCK_CHECKS_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "cpu/expert_block.h"
#include "ffi/contract.h"

namespace jax_marlin_moe {

// The activation of that name, with as many parameters as it takes. The block may be read only if `contract` is ok.
inline void SetActivation(Contract& contract, std::string_view name, ffi::Span<const float> parameters,
                          cpu::ExpertBlock& block) {
  block.activation = cpu::FindActivation(name);
  contract.Require(block.activation != nullptr,
                   "activation is " + Quoted(name) + "; there are: " + cpu::ActivationNames());
  if (block.activation == nullptr) return;
  contract.Require(static_cast<int>(parameters.size()) == block.activation->parameters,
                   "activation " + Quoted(name) + " has " + std::to_string(parameters.size()) +
                       " parameters; it takes " + std::to_string(block.activation->parameters));
  block.activation_parameters = parameters.begin();
}

// That gate_up and down are those of one block, for rows of `hidden` columns.
inline void CheckMatrices(Contract& contract, const cpu::ExpertBlock& block, int64_t hidden) {
  const cpu::ExpertStack &gate_up = *block.gate_up, &down = *block.down;
  const int64_t inner = down.k();
  // Columns come in units of 64 and rows in tiles of 16, so one side may have the longer padding of the same extent.
  contract.Require(gate_up.n() % block.halves() == 0 && block.half() >= inner && block.half() - inner < cpu::kUnit,
                   "gate_up has " + std::to_string(gate_up.n()) + " columns, which are not " +
                       std::to_string(block.halves()) + " times the " + std::to_string(inner) + " rows of down");
  contract.Require(down.n() >= hidden && down.n() - hidden < cpu::kUnit,
                   "down has " + std::to_string(down.n()) + " columns, x has " + std::to_string(hidden));
  contract.Require(gate_up.experts == down.experts, "gate_up has " + std::to_string(gate_up.experts) +
                                                        " experts, down has " + std::to_string(down.experts));
}

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_BLOCK_CHECKS_H_
