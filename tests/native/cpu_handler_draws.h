// Valid calls of each op of csrc/ffi/*_cpu.cc, drawn at random.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu_handler_case.h"
#include "ffi/cpu_op.h"

namespace jax_marlin_moe::fuzz {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Five operands and five attributes of one stack of matrices.
inline void AddMatrix(Random& random, int64_t experts, int64_t k, int64_t n, const std::string& prefix, Case& out) {
  const std::string code = random.Of<std::string>({"int4", "int8", "e2m1", "e4m3"});
  const bool integer = code[0] == 'i';
  const int64_t bits = code == "int4" || code == "e2m1" ? 4 : 8;
  const std::string scale = integer ? "float" : random.Of<std::string>({"float", "e4m3", "e8m0"});
  const std::string zeros = integer ? random.Of<std::string>({"none", "integer", "float"}) : "none";
  const XLA_FFI_DataType scale_type =
      scale == "float"
          ? random.Of<XLA_FFI_DataType>({XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16, XLA_FFI_DataType_F32})
          : XLA_FFI_DataType_U8;
  const int64_t group = random.Of<int64_t>({16, 32, 64, 128, int64_t{1} << 40});
  const int64_t groups = group > k ? 1 : CeilDiv(k, group);
  const Tensor absent_words{XLA_FFI_DataType_S32, {0}}, absent_floats{XLA_FFI_DataType_F32, {0}};
  out.operands.push_back({XLA_FFI_DataType_S32, {experts, k / 16, n * bits / 2}, Content::kWords});
  out.operands.push_back({scale_type, {experts, groups, n}});
  if (zeros == "none") out.operands.push_back(absent_words);
  if (zeros == "integer") {
    out.operands.push_back({XLA_FFI_DataType_S32, {experts, groups, n * bits / 32}, Content::kWords});
  }
  if (zeros == "float") out.operands.push_back({scale_type, {experts, groups, n}});
  out.operands.push_back(random.OneIn(2) ? Tensor{XLA_FFI_DataType_F32, {experts, n / 64}} : absent_floats);
  out.operands.push_back(random.OneIn(2) ? Tensor{XLA_FFI_DataType_F32, {experts, n}} : absent_floats);
  out.attributes.push_back(Text(prefix + "code", code));
  out.attributes.push_back(Number(prefix + "group_size", group));
  out.attributes.push_back(Text(prefix + "scale", scale));
  out.attributes.push_back(Number(prefix + "zero_point", code == "int4" ? 8 : code == "int8" ? 128 : 0));
  out.attributes.push_back(Text(prefix + "zeros", zeros));
}

inline void DrawAlign(Random& random, Case& out) {
  const int64_t tokens = random.Of<int64_t>({0, 1, 5, 33}), top_k = random.Of<int64_t>({1, 2, 8});
  const int64_t experts = random.Of<int64_t>({1, 4, 11, (int64_t{1} << 31) - 1}), slots = tokens * top_k;
  const int64_t block = random.Of<int64_t>({1, 8, 48, 64});
  const int64_t length =
      slots < experts ? std::min(slots * block, slots + experts * (block - 1)) : slots + experts * (block - 1);
  const bool mapped = experts < 100 && random.OneIn(2);
  out.operands = {{XLA_FFI_DataType_S32, {tokens, top_k}, Content::kIds},
                  {XLA_FFI_DataType_S32, {mapped ? experts : 0}, Content::kIds}};
  out.results = {
      {XLA_FFI_DataType_S32, {length}}, {XLA_FFI_DataType_S32, {CeilDiv(length, block)}}, {XLA_FFI_DataType_S32, {1}}};
  out.attributes = {Number("block_size", block), Number("num_experts", experts)};
}

inline void DrawGemm(Random& random, Case& out) {
  const int64_t tokens = random.Of<int64_t>({0, 1, 5, 33}), top_k = random.Of<int64_t>({1, 2, 8});
  const int64_t k = 16 * random.Of<int64_t>({1, 2, 9, 33}), n = 64 * random.Of<int64_t>({1, 3, 9});
  const int64_t block = random.Of<int64_t>({1, 8, 64}), length = random.Of<int64_t>({0, 1, 8, 65, 300});
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  const bool weighted = tokens > 0 && random.OneIn(2);
  out.operands = {{type, {tokens, k}}};
  AddMatrix(random, random.Of<int64_t>({1, 2, 5}), k, n, "", out);
  out.operands.push_back({XLA_FFI_DataType_F32, {weighted ? tokens * top_k : 0}});
  out.operands.push_back({XLA_FFI_DataType_S32, {length}, Content::kSlots});
  out.operands.push_back({XLA_FFI_DataType_S32, {CeilDiv(length, block)}, Content::kIds});
  out.operands.push_back({XLA_FFI_DataType_S32, {1}, Content::kCount});
  out.results = {{type, {tokens * top_k, n}}};
  Attribute multiply = Number("mul_topk_weights", weighted);
  multiply.type = XLA_FFI_DataType_PRED;
  out.attributes.insert(out.attributes.begin(), Number("block_size", block));
  // Names ascend: code, group_size, mul_topk_weights, scale, top_k, zero_point, zeros.
  out.attributes.insert(out.attributes.begin() + 3, multiply);
  out.attributes.insert(out.attributes.begin() + 5, Number("top_k", top_k));
}

inline void DrawBlock(Random& random, Case& out) {
  const int64_t tokens = random.Of<int64_t>({0, 1, 5, 20}), top_k = random.Of<int64_t>({1, 2, 8});
  const int64_t experts = random.Of<int64_t>({1, 2, 5});
  const int64_t hidden = 64 * random.Of<int64_t>({1, 2, 5}) - 16 * random.Below(2);
  const int64_t inner = 16 * random.Of<int64_t>({1, 4, 5, 17}), half = 64 * CeilDiv(inner, 64);
  const int64_t columns = 64 * CeilDiv(hidden, 64);
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  const std::string activation = random.Of<std::string>({"silu", "swiglu", "gelu", "relu2", "swiglu_step", "situ"});
  Attribute parameters;
  parameters.name = "activation_parameters";
  parameters.kind = XLA_FFI_AttrType_ARRAY;
  parameters.type = XLA_FFI_DataType_F32;
  if (activation == "swiglu") parameters.floats = {7.0f, 1.702f, 1.0f};
  if (activation == "swiglu_step") parameters.floats = {7.0f};
  if (activation == "situ") parameters.floats = {4.0f, 25.0f};
  out.operands = {{type, {random.OneIn(3) ? tokens * top_k : tokens, hidden}}};
  Case down;
  AddMatrix(random, experts, hidden, (activation == "relu2" ? 1 : 2) * half, "gate_up_", out);
  AddMatrix(random, experts, inner, columns, "down_", down);
  out.operands.insert(out.operands.end(), down.operands.begin(), down.operands.end());
  out.operands.push_back({XLA_FFI_DataType_F32, {tokens, top_k}});
  out.operands.push_back({XLA_FFI_DataType_S32, {tokens, top_k}, Content::kIds});
  out.operands.push_back({XLA_FFI_DataType_S32, {random.OneIn(2) ? experts + 3 : 0}, Content::kIds});
  const std::string intermediate = random.Of<std::string>({"none", "none", "static_fp8", "dynamic_nvfp4"});
  out.operands.push_back({XLA_FFI_DataType_F32, {random.Below(2)}});
  out.operands.push_back({XLA_FFI_DataType_F32, {intermediate == "none" ? 0 : experts}});
  out.results = {{random.OneIn(3) ? XLA_FFI_DataType_F32 : type, {tokens, columns}}};
  out.attributes.insert(out.attributes.begin(), down.attributes.begin(), down.attributes.end());
  out.attributes.insert(out.attributes.begin(), {Text("activation", activation), parameters});
  out.attributes.push_back(Text("intermediate", intermediate));
}

inline void DrawDispatches(Random& random, Case& out) {
  const int64_t rows = random.Of<int64_t>({0, 1, 5, 33}), result_rows = random.Of<int64_t>({0, 1, 7, 40});
  const int64_t k = 16 * random.Of<int64_t>({1, 2, 9, 33}), n = 64 * random.Of<int64_t>({1, 3, 9});
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  out.operands = {{type, {rows, k}}};
  AddMatrix(random, random.Of<int64_t>({1, 2, 5}), k, n, "", out);
  out.operands.push_back({XLA_FFI_DataType_S32, {random.Of<int64_t>({0, 1, 9, 50}), 4}, Content::kIds});
  out.results = {{type, {result_rows, n}}, {XLA_FFI_DataType_S32, {1}}};
}

inline void DrawProduct(Random& random, Case& out) {
  const int64_t rows = random.Of<int64_t>({0, 1, 5, 33}), slots_per_row = random.Of<int64_t>({1, 2, 8});
  const int64_t k = 16 * random.Of<int64_t>({1, 2, 9, 33}), n = 64 * random.Of<int64_t>({1, 3, 9});
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  const bool is_transposed = random.OneIn(2);
  out.operands = {{type, {rows, is_transposed ? n : k}}};
  AddMatrix(random, random.Of<int64_t>({1, 2, 5}), k, n, "", out);
  out.operands.back().shape = {0};  // of the bias
  out.operands.push_back({XLA_FFI_DataType_S32, {rows * slots_per_row}, Content::kIds});
  out.results = {{random.OneIn(2) ? type : XLA_FFI_DataType_F32, {rows * slots_per_row, is_transposed ? k : n}}};
  Attribute transposed = Number("transposed", is_transposed);
  transposed.type = XLA_FFI_DataType_PRED;
  // Names ascend: code, group_size, scale, slots_per_row, transposed, zero_point, zeros.
  out.attributes.insert(out.attributes.begin() + 3, {Number("slots_per_row", slots_per_row), transposed});
}

inline std::string TargetOf(const char* name) {
  for (const CpuOp* op = CpuOp::First(); op != nullptr; op = op->next) {
    if (std::strcmp(op->name, name) == 0)
      return std::string("jax_marlin_moe.") + name + ".cpu.v" + std::to_string(op->version);
  }
  std::abort();
}

// A product or a block, some of whose operands are stacks of layers.
inline void DrawStacks(Random& random, Case& out) {
  const bool block = random.OneIn(2);
  (block ? DrawBlock : DrawGemm)(random, out);
  const int64_t layers = random.Of<int64_t>({1, 2, 3});
  Attribute operands;
  operands.name = "layer_operands";
  operands.kind = XLA_FFI_AttrType_ARRAY;
  const auto count = static_cast<int64_t>(out.operands.size());
  for (int64_t place = 0; place < count; ++place) {
    if (place != 1 && random.OneIn(2)) continue;
    std::vector<int64_t>& shape = out.operands[static_cast<size_t>(place)].shape;
    shape.insert(shape.begin(), layers);
    operands.places.insert(operands.places.end(), {place, count + random.Below(2)});
  }
  out.operands.insert(out.operands.end(), 2, {XLA_FFI_DataType_S32, {}, Content::kIds});
  // One index of the two may have no stack: then it is an operand of the op, which refuses it.
  out.attributes.insert(out.attributes.end(),
                        {operands, Text("layer_target", TargetOf(block ? "fused_moe" : "moe_gemm"))});
}

inline void DrawLayer(Random& random, Case& out) {
  const int64_t tokens = random.Of<int64_t>({0, 1, 5, 20}), experts = random.Of<int64_t>({2, 4, 12});
  const int64_t top_k = random.Of<int64_t>({1, 2}), shared = random.Of<int64_t>({0, 1, 3});
  const int64_t hidden = 64 * random.Of<int64_t>({1, 2}), rows = hidden - 16 * random.Below(2);
  const int64_t inner = 16 * random.Of<int64_t>({1, 4, 5}), half = 64 * CeilDiv(inner, 64);
  const bool mapped = random.OneIn(3);
  const int64_t identity = random.OneIn(3) ? 1 : 0, routed = experts - identity;
  const int64_t local = mapped ? random.Of<int64_t>({1, 3}) : routed;
  const XLA_FFI_DataType type = random.OneIn(2) ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F16;
  const auto numbers = [&](bool there, std::vector<int64_t> shape) {
    const auto float_type =
        random.Of<XLA_FFI_DataType>({XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16, XLA_FFI_DataType_F32});
    return Tensor{float_type, there ? std::move(shape) : std::vector<int64_t>{0}};
  };
  Attribute parameters;
  parameters.name = "activation_parameters";
  parameters.kind = XLA_FFI_AttrType_ARRAY;
  parameters.type = XLA_FFI_DataType_F32;
  out.operands = {{type, {tokens, hidden}}};
  AddMatrix(random, local, hidden, 2 * half, "gate_up_", out);
  AddMatrix(random, local, inner, hidden, "down_", out);
  if (shared > 0) {
    AddMatrix(random, shared, hidden, 2 * half, "shared_gate_up_", out);
    AddMatrix(random, shared, inner, hidden, "shared_down_", out);
  } else {
    for (int i = 0; i < 10; ++i) out.operands.push_back({XLA_FFI_DataType_S32, {0}});
  }
  out.operands.push_back({XLA_FFI_DataType_S32, {mapped ? routed : 0}, Content::kIds});
  out.operands.push_back(numbers(true, {rows, experts}));
  out.operands.push_back(numbers(random.OneIn(3), {tokens, rows}));
  for (int i = 0; i < 3; ++i) out.operands.push_back(numbers(random.OneIn(2), {experts}));
  out.operands.push_back(random.OneIn(3) ? Tensor{XLA_FFI_DataType_S32, {tokens, top_k}, Content::kIds}
                                         : Tensor{XLA_FFI_DataType_S32, {0}});
  out.operands.push_back(numbers(random.OneIn(2), {rows, 1}));
  out.operands.push_back(numbers(random.OneIn(3), {rows}));
  out.results = {{random.OneIn(3) ? XLA_FFI_DataType_F32 : type, {tokens, hidden}},
                 {XLA_FFI_DataType_F32, {tokens, top_k}},
                 {XLA_FFI_DataType_S32, {tokens, top_k}}};
  const std::string scoring =
      random.Of<std::string>({"softmax", "sigmoid", "sqrtsoftplus", "identity", "chosen_sigmoid", "sparsemixer"});
  const int64_t groups = random.Of<int64_t>({1, 2});
  const std::vector<Attribute> rule = {Text("activation", "silu"),
                                       parameters,
                                       Flag("apply_on_input", random.OneIn(3)),
                                       Number("identity_experts", identity),
                                       Float("jitter", 0x3C23D70A),
                                       Float("norm_epsilon", 0x358637BD),
                                       Number("num_groups", groups),
                                       Flag("renormalize", random.OneIn(2)),
                                       Float("renormalize_epsilon", random.OneIn(2) ? 0 : 0x1E3CE508),
                                       Float("scale", 0x40200000),
                                       Text("scoring", scoring),
                                       Float("soft_cap", random.OneIn(2) ? 0 : 0x40200000),
                                       Flag("softmax_after_topk", random.OneIn(3)),
                                       Flag("top2", random.OneIn(2)),
                                       Number("top_groups", 1 + random.Below(groups)),
                                       Number("top_k", top_k)};
  out.attributes.insert(out.attributes.end(), rule.begin(), rule.end());
  std::sort(out.attributes.begin(), out.attributes.end(),
            [](const Attribute& a, const Attribute& b) { return a.name < b.name; });
}

const Op kOps[] = {{"moe_align_block_size", DrawAlign},
                   {"moe_gemm", DrawGemm},
                   {"fused_moe", DrawBlock},
                   {"expert_gemm", DrawDispatches},
                   {"grouped_product", DrawProduct},
                   {"layer_of_stack", DrawStacks},
                   {"moe_layer", DrawLayer}};
constexpr int kOpCount = 7;

inline XLA_FFI_Handler* HandlerOf(const char* name) {
  for (const CpuOp* op = CpuOp::First(); op != nullptr; op = op->next) {
    if (std::strcmp(op->name, name) == 0) return op->handler;
  }
  std::fprintf(stderr, "%s has no CPU handler\n", name);
  std::abort();
}

}  // namespace jax_marlin_moe::fuzz
