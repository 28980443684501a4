// The CPU handler of a whole layer: decodes, checks, and calls.
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "cpu/expert_block.h"
#include "cpu/moe_layer.h"
#include "cpu/router.h"
#include "ffi/block_checks.h"
#include "ffi/contract.h"
#include "ffi/cpu_op.h"
#include "ffi/matrix_operands.h"
#include "ffi/xla_workers.h"

namespace jax_marlin_moe {
namespace {

// The operands, in their order; matrices have five each (matrix_operands.h). Optional ones are [0] where absent.
enum Operand : size_t {
  kX = 0,              // [M, H] bf16 or f16, H as packed
  kGateUp = 1,         // a matrix
  kDown = 6,           // a matrix
  kSharedGateUp = 11,  // a matrix, or five times [0]
  kSharedDown = 16,    // likewise
  kExpertMap = 21,     // [global experts] s32
  kRouter = 22,        // [K, global experts]
  kRouterInput = 23,   // [M, K]
  kRouterBias = 24,    // [global experts]
  kCorrectionBias = 25,
  kExpertScale = 26,
  kGiven = 27,       // [M, top_k] s32
  kGate = 28,        // [K, 1]
  kInputScale = 29,  // [K]
  kOperands = 30,
};

constexpr size_t kResults = 3;         // y, topk_weights, topk_ids
constexpr int64_t kMostShared = 1024;  // experts that every token visits

// What a call consists of, with the first fault in the contract.
struct Call {
  Contract& contract;
  const ffi::RemainingArgs& operands;
  const ffi::Dictionary& attributes;

  ffi::AnyBuffer buffer(size_t operand) const { return operands.get<ffi::AnyBuffer>(operand).value(); }
  bool has(size_t operand) const { return !Contract::IsAbsent(buffer(operand)); }

  template <class Type>
  Type attribute(const std::string& name) const {
    ffi::ErrorOr<Type> value = attributes.get<Type>(name);
    contract.Require(value.has_value(), "attribute " + name + " is missing, or of another type");
    return value.has_value() ? *value : Type();
  }

  cpu::ExpertStack matrix(const std::string& name, size_t first, int64_t k) const {
    const auto text = [&](const char* what) { return attribute<std::string_view>(name + what); };
    const MatrixFormat format = {text("_code"), text("_scale"), text("_zeros"),
                                 attribute<int64_t>(name + "_zero_point"), attribute<int64_t>(name + "_group_size")};
    return CheckMatrix(contract, name + " ", k,
                       {buffer(first), buffer(first + 1), buffer(first + 2), buffer(first + 3), buffer(first + 4)},
                       format);
  }

  // The s32 operand, which has been checked, or null.
  const int32_t* ids(size_t operand) const {
    return has(operand) ? static_cast<const int32_t*>(buffer(operand).untyped_data()) : nullptr;
  }

  // Floats of these extents, or nothing.
  cpu::Numbers numbers(size_t operand, const char* name, std::initializer_list<int64_t> extents) const {
    cpu::Numbers found;
    if (!has(operand)) return found;
    const ffi::AnyBuffer array = buffer(operand);
    contract.HasDtype(array, name, {ffi::DataType::BF16, ffi::DataType::F16, ffi::DataType::F32})
        .HasExtents(array, name, extents);
    found.data = array.untyped_data();
    found.type = array.element_type() == ffi::DataType::BF16  ? cpu::Number::kBf16
                 : array.element_type() == ffi::DataType::F16 ? cpu::Number::kF16
                                                              : cpu::Number::kF32;
    return found;
  }
};

// The matrices of a layer; the shared ones where there are shared experts.
struct Matrices {
  Matrices(const Call& call, int64_t hidden, int64_t inner)
      : gate_up(call.matrix("gate_up", kGateUp, hidden)),
        down(call.matrix("down", kDown, inner)),
        shared(call.has(kSharedDown)) {
    if (!shared) return;
    shared_gate_up = call.matrix("shared_gate_up", kSharedGateUp, hidden);
    shared_down = call.matrix("shared_down", kSharedDown, inner);
  }

  const cpu::ExpertStack gate_up, down;
  const bool shared;
  cpu::ExpertStack shared_gate_up, shared_down;
};

void CheckArrays(Contract& contract, const ffi::RemainingArgs& operands, const ffi::RemainingRets& results) {
  contract.Require(operands.size() == kOperands && results.size() == kResults,
                   "there are " + std::to_string(operands.size()) + " operands and " + std::to_string(results.size()) +
                       " results; there must be " + std::to_string(kOperands) + " and " + std::to_string(kResults));
  if (!contract.ok()) return;
  for (size_t i = 0; i < kOperands; ++i) {
    contract.Require(operands.get<ffi::AnyBuffer>(i).has_value(), "operand " + std::to_string(i) + " is no array");
  }
  for (size_t i = 0; i < kResults; ++i) {
    contract.Require(results.get<ffi::AnyBuffer>(i).has_value(), "result " + std::to_string(i) + " is no array");
  }
}

// Points the block to the matrices, which must outlive it.
void SetMatrices(Contract& contract, const Matrices& matrices, int64_t hidden, cpu::ExpertBlock& block) {
  block.gate_up = &matrices.gate_up;
  block.down = &matrices.down;
  if (matrices.shared) {
    const cpu::ExpertStack &gate_up = matrices.shared_gate_up, &down = matrices.shared_down;
    block.shared_gate_up = &gate_up;
    block.shared_down = &down;
    contract.Require(gate_up.n() == matrices.gate_up.n() && down.n() == matrices.down.n() &&
                         gate_up.experts == down.experts && down.experts <= kMostShared,
                     "the shared experts have other sizes than those that are chosen, or there are more than " +
                         std::to_string(kMostShared));
  }
  CheckMatrices(contract, block, hidden);
}

// The router's operands and its rule, for x [tokens, hidden]; the rule is held against the sizes in CheckRule.
cpu::Router ReadRouter(const Call& call, int64_t tokens, int64_t hidden) {
  Contract& contract = call.contract;
  cpu::Router router{};
  router.tokens = tokens;
  router.hidden = contract.Extent(call.buffer(kRouter), "router", 0);
  router.experts = contract.Extent(call.buffer(kRouter), "router", 1);
  contract.Require(
      router.hidden >= 1 && router.hidden <= hidden,
      "router has " + std::to_string(router.hidden) + " rows, x has " + std::to_string(hidden) + " columns");
  router.kernel = call.numbers(kRouter, "router", {router.hidden, router.experts});
  const bool own_input = call.has(kRouterInput);
  router.rows = own_input ? call.numbers(kRouterInput, "router_input", {tokens, router.hidden})
                          : call.numbers(kX, "x", {tokens, hidden});
  router.row_stride = own_input ? router.hidden : hidden;
  router.bias = call.numbers(kRouterBias, "router_bias", {router.experts});
  router.correction_bias = call.numbers(kCorrectionBias, "correction_bias", {router.experts});
  router.expert_scale = call.numbers(kExpertScale, "expert_scale", {router.experts});
  const auto scoring = call.attribute<std::string_view>("scoring");
  router.scoring = cpu::FindScoring(scoring);
  contract.Require(router.scoring != nullptr, "scoring is " + Quoted(scoring) + "; there are: " + cpu::ScoringNames());
  router.top_k = call.attribute<int64_t>("top_k");
  router.renormalize = call.attribute<bool>("renormalize");
  router.softmax_after_topk = call.attribute<bool>("softmax_after_topk");
  router.num_groups = call.attribute<int64_t>("num_groups");
  router.top_groups = call.attribute<int64_t>("top_groups");
  router.top2 = call.attribute<bool>("top2");
  router.scale = call.attribute<float>("scale");
  router.renormalize_epsilon = call.attribute<float>("renormalize_epsilon");
  router.soft_cap = call.attribute<float>("soft_cap");
  router.jitter = call.attribute<float>("jitter");
  router.input_scale = call.numbers(kInputScale, "input_scale", {router.hidden});
  router.norm_epsilon = call.attribute<float>("norm_epsilon");
  return router;
}

// That the rule can choose among the router's experts, and that the matrices are those of the ones it routes to.
void CheckRule(const Call& call, const cpu::MoeLayer& layer) {
  Contract& contract = call.contract;
  const cpu::Router& router = layer.router;
  const std::string experts = std::to_string(router.experts), identity = std::to_string(layer.identity_experts);
  contract.Require(layer.identity_experts >= 0 && layer.identity_experts <= router.experts,
                   "identity_experts is " + identity + "; there are " + experts + " experts");
  if (!contract.ok()) return;
  contract.Require(router.top_k >= 1 && router.top_k <= router.experts && router.num_groups >= 1 &&
                       router.experts % router.num_groups == 0 && router.top_groups >= 1 &&
                       router.top_groups <= router.num_groups,
                   "top_k is " + std::to_string(router.top_k) + " and num_groups " + std::to_string(router.num_groups) +
                       ", of which " + std::to_string(router.top_groups) + " stay: there are " + experts + " experts");
  const ffi::AnyBuffer expert_map = call.buffer(kExpertMap);
  contract.HasShapeOrIsAbsent(expert_map, "expert_map", ffi::DataType::S32, {layer.routed()});
  contract.Require(call.has(kExpertMap) || layer.block.down->experts == layer.routed(),
                   "router has " + experts + " experts, of which " + identity + " return their input; down has " +
                       std::to_string(layer.block.down->experts));
}

// That all that the layer counts fits its integers.
void CheckProducts(Contract& contract, const cpu::MoeLayer& layer) {
  const cpu::ExpertBlock& block = layer.block;
  const int64_t tokens = layer.router.tokens, slots_of_token = layer.router.top_k + layer.shared();
  const int64_t slots = contract.Product("the number of slots", {tokens, slots_of_token});
  contract.Require(slots <= std::numeric_limits<int32_t>::max() && layer.router.experts + slots_of_token <= 1 << 30,
                   "there are " + std::to_string(slots) + " slots, more than int32 counts");
  contract.Product("what a token's experts compute", {slots_of_token, block.inner()});
  contract.Product("what a token's experts return", {slots_of_token, block.down->n()});
  contract.Product("the logits", {tokens, layer.router.experts});
  contract.Product("the rows of all slots", {slots, block.gate_up->k()});
}

// Points the layer to its results y, topk_weights and topk_ids, and to the ids that are given in place of a choice.
void SetResults(const Call& call, const ffi::RemainingRets& results, cpu::MoeLayer& layer) {
  Contract& contract = call.contract;
  const int64_t tokens = layer.router.tokens, top_k = layer.router.top_k;
  ffi::AnyBuffer y = *results.get<ffi::AnyBuffer>(0).value();
  ffi::AnyBuffer weights = *results.get<ffi::AnyBuffer>(1).value(), ids = *results.get<ffi::AnyBuffer>(2).value();
  contract.HasDtype(y, "y", {call.buffer(kX).element_type(), ffi::DataType::F32})
      .HasExtents(y, "y", {tokens, layer.block.down->n()});
  contract.HasShape(weights, "topk_weights", ffi::DataType::F32, {tokens, top_k});
  contract.HasShape(ids, "topk_ids", ffi::DataType::S32, {tokens, top_k});
  contract.HasShapeOrIsAbsent(call.buffer(kGiven), "given", ffi::DataType::S32, {tokens, top_k});
  layer.router.given = call.ids(kGiven);
  layer.router.topk_weights = static_cast<float*>(weights.untyped_data());
  layer.router.topk_ids = static_cast<int32_t*>(ids.untyped_data());
  layer.block.float_result = y.element_type() == ffi::DataType::F32;
  layer.block.y = y.untyped_data();
}

ffi::Error MoeLayerImpl(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                        ffi::Dictionary attributes) {
  Contract contract("moe_layer");
  CheckArrays(contract, operands, results);
  if (!contract.ok()) return contract.ToError();
  const Call call{contract, operands, attributes};
  const ffi::AnyBuffer x = call.buffer(kX);
  const int64_t tokens = contract.Extent(x, "x", 0), hidden = contract.Extent(x, "x", 1);
  const int64_t inner = contract.Extent(call.buffer(kDown), "down packed", 1) * cpu::kTileK;
  cpu::MoeLayer layer{};
  SetActivation(contract, call.attribute<std::string_view>("activation"),
                call.attribute<ffi::Span<const float>>("activation_parameters"), layer.block);
  if (!contract.ok()) return contract.ToError();
  layer.block.type = CheckElement(contract, x, "x");
  contract.HasExtents(x, "x", {tokens, hidden});
  const Matrices matrices(call, hidden, inner);
  if (!contract.ok()) return contract.ToError();
  SetMatrices(contract, matrices, hidden, layer.block);
  layer.router = ReadRouter(call, tokens, hidden);
  layer.shared_gate = call.numbers(kGate, "gate", {layer.router.hidden, 1});
  layer.apply_on_input = call.attribute<bool>("apply_on_input");
  layer.identity_experts = call.attribute<int64_t>("identity_experts");
  if (!contract.ok()) return contract.ToError();
  CheckRule(call, layer);
  if (!contract.ok()) return contract.ToError();
  CheckProducts(contract, layer);
  if (!contract.ok()) return contract.ToError();
  SetResults(call, results, layer);
  if (!contract.ok()) return contract.ToError();
  layer.block.routing.expert_map = call.ids(kExpertMap);
  layer.block.x = static_cast<const uint16_t*>(x.untyped_data());
  XlaWorkers workers(pool);
  return contract.Run([&] { cpu::RunMoeLayer(workers, layer); });
}

XLA_FFI_Error* HandleMoeLayer(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, MoeLayerImpl,
                         ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
  return (*handler)(frame);
}

const CpuOp kMoeLayerOp("moe_layer", 2, HandleMoeLayer);

}  // namespace
}  // namespace jax_marlin_moe
