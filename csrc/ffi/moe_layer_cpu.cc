// The CPU handler of a whole layer: decodes, checks, and calls the router and the expert block.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "cpu/element.h"
#include "cpu/expert_block.h"
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

// The choice, and behind it the shared experts, of every token.
struct Slots {
  cpu::Scratch<int32_t> ids;
  cpu::Scratch<float> weights;
  cpu::Scratch<uint16_t> rows;  // of x, one for each slot, where weights multiply them
  cpu::Scratch<int32_t> map;    // of experts to those of the matrices, with the shared ones
  cpu::Scratch<float> sums;     // of the rows' results, where identity experts add to them
};

// Adds what a token's identity experts return, its row, and rounds once.
void AddInput(const cpu::Router& router, const cpu::ExpertBlock& block, int64_t first_identity, int64_t token,
              float* sums, bool float_result, void* y) {
  const int64_t hidden = block.gate_up->k(), columns = block.down->n();
  float kept = 0.0f;
  for (int64_t slot = token * router.top_k; slot < (token + 1) * router.top_k; ++slot) {
    const int32_t id = router.topk_ids[slot];
    if (id >= first_identity && id < router.experts) kept += router.topk_weights[slot];
  }
  for (int64_t k = 0; k < std::min(hidden, columns); ++k) {
    sums[k] += kept * cpu::FloatFromElement(block.x[token * hidden + k], block.type);
  }
  if (float_result) {
    std::copy_n(sums, columns, static_cast<float*>(y) + token * columns);
  } else {
    cpu::RoundRow(sums, columns, block.type, static_cast<uint16_t*>(y) + token * columns);
  }
}

// What is special about a rule beyond its router.
struct Rule {
  bool on_input;
  int64_t identity_experts;  // of the router's, the last ones
};

void RunLayer(cpu::Workers& workers, const cpu::Router& router, cpu::ExpertBlock block, cpu::Numbers gate, Rule rule) {
  cpu::RunRouter(workers, router);
  const bool on_input = rule.on_input;
  const int64_t routed = router.experts - rule.identity_experts;
  const cpu::ExpertBlock given = block;
  const int64_t tokens = router.tokens, top_k = router.top_k, hidden = block.gate_up->k();
  const int64_t shared = block.shared_down == nullptr ? 0 : block.shared_down->experts;
  const int64_t slots = top_k + shared;
  Slots made;
  made.ids.resize(static_cast<size_t>(tokens * slots));
  made.weights.resize(made.ids.size());
  if (on_input) made.rows.resize(made.ids.size() * static_cast<size_t>(hidden));
  const auto fill = [&](int64_t token) {
    float sum = 0.0f;
    if (gate.data != nullptr) {
      for (int64_t k = 0; k < router.hidden; ++k) {
        sum += cpu::FloatFromElement(block.x[token * hidden + k], block.type) * gate[k];
      }
    }
    for (int64_t j = 0; j < slots; ++j) {
      const int64_t slot = token * slots + j;
      const bool chosen = j < top_k;
      const float weight =
          !chosen ? gate.data == nullptr ? 1.0f : cpu::Sigmoid(sum) : router.topk_weights[token * top_k + j];
      made.ids[static_cast<size_t>(slot)] =
          chosen ? router.topk_ids[token * top_k + j] : static_cast<int32_t>(routed + j - top_k);
      // An id behind the routed experts would be one of the shared experts.
      if (chosen && made.ids[static_cast<size_t>(slot)] >= routed) made.ids[static_cast<size_t>(slot)] = -1;
      made.weights[static_cast<size_t>(slot)] = chosen && on_input ? 1.0f : weight;
      if (!on_input) continue;
      uint16_t* const row = made.rows.data() + slot * hidden;
      if (!chosen) {
        std::copy_n(block.x + token * hidden, hidden, row);
        continue;
      }
      for (int64_t k = 0; k < hidden; ++k) {
        const float product = cpu::FloatFromElement(block.x[token * hidden + k], block.type) * weight;
        cpu::RoundRow(&product, 1, block.type, row + k);
      }
    }
  };
  cpu::RunPhases(workers, {{tokens, fill}});
  if (block.routing.expert_map != nullptr) {
    made.map.assign(block.routing.expert_map, block.routing.expert_map + routed);
    for (int32_t& local : made.map) {
      if (local >= block.down->experts) local = -1;
    }
    for (int64_t s = 0; s < shared; ++s) made.map.push_back(static_cast<int32_t>(block.down->experts + s));
    block.routing.expert_map = made.map.data();
  }
  block.routing.num_experts = routed + shared;
  block.routing.topk_ids = made.ids.data();
  block.routing.slots = tokens * slots;
  block.topk_weights = made.weights.data();
  block.top_k = slots;
  block.slots_per_row = on_input ? 1 : slots;
  if (on_input) block.x = made.rows.data();
  if (rule.identity_experts == 0) return cpu::RunExpertBlock(workers, block);
  const int64_t columns = block.down->n();
  made.sums.resize(static_cast<size_t>(tokens * columns));
  block.y = made.sums.data();
  block.float_result = true;
  cpu::RunExpertBlock(workers, block);
  const auto add = [&](int64_t token) {
    AddInput(router, given, routed, token, made.sums.data() + token * columns, given.float_result, given.y);
  };
  cpu::RunPhases(workers, {{tokens, add}});
}

ffi::Error MoeLayerImpl(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                        ffi::Dictionary attributes) {
  Contract contract("moe_layer");
  contract.Require(operands.size() == kOperands && results.size() == 3,
                   "there are " + std::to_string(operands.size()) + " operands and " + std::to_string(results.size()) +
                       " results; there must be " + std::to_string(kOperands) + " and 3");
  if (!contract.ok()) return contract.ToError();
  for (size_t i = 0; i < kOperands; ++i) {
    contract.Require(operands.get<ffi::AnyBuffer>(i).has_value(), "operand " + std::to_string(i) + " is no array");
  }
  for (size_t i = 0; i < 3; ++i) {
    contract.Require(results.get<ffi::AnyBuffer>(i).has_value(), "result " + std::to_string(i) + " is no array");
  }
  if (!contract.ok()) return contract.ToError();
  const Call call{contract, operands, attributes};
  const ffi::AnyBuffer x = call.buffer(kX);
  const int64_t tokens = contract.Extent(x, "x", 0), hidden = contract.Extent(x, "x", 1);
  const int64_t inner = contract.Extent(call.buffer(kDown), "down packed", 1) * cpu::kTileK;
  const int64_t router_rows = contract.Extent(call.buffer(kRouter), "router", 0);
  const int64_t experts = contract.Extent(call.buffer(kRouter), "router", 1);
  cpu::ExpertBlock block;
  SetActivation(contract, call.attribute<std::string_view>("activation"),
                call.attribute<ffi::Span<const float>>("activation_parameters"), block);
  if (!contract.ok()) return contract.ToError();
  block.type = CheckElement(contract, x, "x");
  contract.HasExtents(x, "x", {tokens, hidden});
  const cpu::ExpertStack gate_up = call.matrix("gate_up", kGateUp, hidden), down = call.matrix("down", kDown, inner);
  cpu::ExpertStack shared_gate_up, shared_down;
  const bool shared = call.has(kSharedDown);
  if (shared) {
    shared_gate_up = call.matrix("shared_gate_up", kSharedGateUp, hidden);
    shared_down = call.matrix("shared_down", kSharedDown, inner);
  }
  if (!contract.ok()) return contract.ToError();
  block.gate_up = &gate_up;
  block.down = &down;
  if (shared) {
    block.shared_gate_up = &shared_gate_up;
    block.shared_down = &shared_down;
    contract.Require(shared_gate_up.n() == gate_up.n() && shared_down.n() == down.n() &&
                         shared_gate_up.experts == shared_down.experts && shared_down.experts <= kMostShared,
                     "the shared experts have other sizes than those that are chosen, or there are more than " +
                         std::to_string(kMostShared));
  }
  CheckMatrices(contract, block, hidden);

  cpu::Router router;
  const bool own_input = call.has(kRouterInput);
  contract.Require(router_rows >= 1 && router_rows <= hidden,
                   "router has " + std::to_string(router_rows) + " rows, x has " + std::to_string(hidden) + " columns");
  router.kernel = call.numbers(kRouter, "router", {router_rows, experts});
  router.rows = own_input ? call.numbers(kRouterInput, "router_input", {tokens, router_rows})
                          : call.numbers(kX, "x", {tokens, hidden});
  router.bias = call.numbers(kRouterBias, "router_bias", {experts});
  router.correction_bias = call.numbers(kCorrectionBias, "correction_bias", {experts});
  router.expert_scale = call.numbers(kExpertScale, "expert_scale", {experts});
  const cpu::Numbers gate = call.numbers(kGate, "gate", {router_rows, 1});
  router.tokens = tokens;
  router.hidden = router_rows;
  router.row_stride = own_input ? router_rows : hidden;
  router.experts = experts;
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
  router.input_scale = call.numbers(kInputScale, "input_scale", {router_rows});
  router.norm_epsilon = call.attribute<float>("norm_epsilon");
  const Rule rule = {call.attribute<bool>("apply_on_input"), call.attribute<int64_t>("identity_experts")};
  if (!contract.ok()) return contract.ToError();
  contract.Require(rule.identity_experts >= 0 && rule.identity_experts <= experts,
                   "identity_experts is " + std::to_string(rule.identity_experts) + "; there are " +
                       std::to_string(experts) + " experts");
  if (!contract.ok()) return contract.ToError();
  const int64_t routed = experts - rule.identity_experts;
  contract.Require(router.top_k >= 1 && router.top_k <= experts && router.num_groups >= 1 &&
                       experts % router.num_groups == 0 && router.top_groups >= 1 &&
                       router.top_groups <= router.num_groups,
                   "top_k is " + std::to_string(router.top_k) + " and num_groups " + std::to_string(router.num_groups) +
                       ", of which " + std::to_string(router.top_groups) + " stay: there are " +
                       std::to_string(experts) + " experts");
  if (call.has(kExpertMap)) contract.HasShape(call.buffer(kExpertMap), "expert_map", ffi::DataType::S32, {routed});
  contract.Require(call.has(kExpertMap) || down.experts == routed,
                   "router has " + std::to_string(experts) + " experts, of which " +
                       std::to_string(rule.identity_experts) + " return their input; down has " +
                       std::to_string(down.experts));
  const int64_t slots_of_token = router.top_k + (shared ? shared_down.experts : 0);
  const int64_t slots = contract.Product("the number of slots", {tokens, slots_of_token});
  contract.Require(slots <= std::numeric_limits<int32_t>::max() && experts + slots_of_token <= 1 << 30,
                   "there are " + std::to_string(slots) + " slots, more than int32 counts");
  contract.Product("what a token's experts compute", {slots_of_token, inner});
  contract.Product("what a token's experts return", {slots_of_token, down.n()});
  contract.Product("the logits", {tokens, experts});
  contract.Product("the rows of all slots", {slots, hidden});
  if (!contract.ok()) return contract.ToError();
  ffi::AnyBuffer y = *results.get<ffi::AnyBuffer>(0).value();
  ffi::AnyBuffer weights = *results.get<ffi::AnyBuffer>(1).value(), ids = *results.get<ffi::AnyBuffer>(2).value();
  contract.HasDtype(y, "y", {x.element_type(), ffi::DataType::F32}).HasExtents(y, "y", {tokens, down.n()});
  contract.HasShape(weights, "topk_weights", ffi::DataType::F32, {tokens, router.top_k});
  contract.HasShape(ids, "topk_ids", ffi::DataType::S32, {tokens, router.top_k});
  contract.HasShapeOrIsAbsent(call.buffer(kGiven), "given", ffi::DataType::S32, {tokens, router.top_k});
  if (!contract.ok()) return contract.ToError();
  router.given = call.has(kGiven) ? static_cast<const int32_t*>(call.buffer(kGiven).untyped_data()) : nullptr;
  router.topk_weights = static_cast<float*>(weights.untyped_data());
  router.topk_ids = static_cast<int32_t*>(ids.untyped_data());
  block.x_scale = nullptr;
  block.intermediate = nullptr;
  block.intermediate_scales = nullptr;
  block.float_result = y.element_type() == ffi::DataType::F32;
  block.routing.expert_map =
      call.has(kExpertMap) ? static_cast<const int32_t*>(call.buffer(kExpertMap).untyped_data()) : nullptr;
  block.x = static_cast<const uint16_t*>(x.untyped_data());
  block.y = y.untyped_data();
  XlaWorkers workers(pool);
  return contract.Run([&] { RunLayer(workers, router, block, gate, rule); });
}

XLA_FFI_Error* HandleMoeLayer(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, MoeLayerImpl,
                         ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
  return (*handler)(frame);
}

const CpuOp kMoeLayerOp("moe_layer", 2, HandleMoeLayer);

}  // namespace
}  // namespace jax_marlin_moe
