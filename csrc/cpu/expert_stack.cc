// Checks and views of stacked expert matrices.
#include "cpu/expert_stack.h"

#include "cpu/align.h"

namespace jax_marlin_moe::cpu {
namespace {

// A value of an attribute and what it stands for here.
template <class Type>
struct Spelling {
  std::string_view name;
  Type meaning;
};

struct CodeWidth {
  Code code;
  int bits;
};

constexpr Spelling<CodeWidth> kCodes[] = {
    {"int4", {Code::kInt4, 4}}, {"int8", {Code::kInt8, 8}}, {"e2m1", {Code::kE2M1, 4}}, {"e4m3", {Code::kE4M3, 8}}};
constexpr Spelling<Zeros> kZeros[] = {{"none", Zeros::kNone}, {"integer", Zeros::kInteger}, {"float", Zeros::kFloat}};

struct StoredScale {
  ffi::DataType dtype;
  Scale scale;
  int64_t bytes;
};

constexpr Spelling<StoredScale> kScales[] = {{"float", {ffi::DataType::BF16, Scale::kBf16, 2}},
                                             {"float", {ffi::DataType::F16, Scale::kF16, 2}},
                                             {"float", {ffi::DataType::F32, Scale::kF32, 4}},
                                             {"e4m3", {ffi::DataType::U8, Scale::kE4M3, 1}},
                                             {"e8m0", {ffi::DataType::U8, Scale::kE8M0, 1}}};

// What `value` stands for; `contract` fails for a spelling that is not in the table.
template <class Type, size_t count>
Type Read(Contract& contract, const std::string& name, std::string_view value, const Spelling<Type> (&table)[count]) {
  std::string known;
  for (const Spelling<Type>& row : table) {
    if (row.name == value) return row.meaning;
    known += (known.empty() ? "" : ", ") + std::string(row.name);
  }
  contract.Require(false, name + " is '" + std::string(value) + "'; there are: " + known);
  return table[0].meaning;
}

// How `buffer` stores scales of the type `name`.
StoredScale ReadScale(Contract& contract, const std::string& prefix, std::string_view name,
                      const ffi::AnyBuffer& buffer) {
  Read(contract, prefix + "scale", name, kScales);
  for (const Spelling<StoredScale>& row : kScales) {
    if (row.name == name && row.meaning.dtype == buffer.element_type()) return row.meaning;
  }
  contract.Require(false, prefix + "scales have dtype code " + std::to_string(static_cast<int>(buffer.element_type())) +
                              ", in which '" + std::string(name) + "' scales are not stored");
  return kScales[0].meaning;
}

}  // namespace

Element CheckElement(Contract& contract, const ffi::AnyBuffer& buffer, const char* name) {
  contract.HasDtype(buffer, name, {ffi::DataType::BF16, ffi::DataType::F16});
  return buffer.element_type() == ffi::DataType::F16 ? Element::kF16 : Element::kBf16;
}

ExpertStack::ExpertStack(Contract& contract, const std::string& prefix, int64_t k, const MatrixOperands& operands,
                         const MatrixFormat& format) {
  const CodeWidth code = Read(contract, prefix + "code", format.code, kCodes);
  const Zeros zeros = Read(contract, prefix + "zeros", format.zeros, kZeros);
  const StoredScale scale = ReadScale(contract, prefix, format.scale, operands.scales);
  const bool integer_code = code.code == Code::kInt4 || code.code == Code::kInt8;
  contract.Require(zeros == Zeros::kNone || integer_code,
                   prefix + "zeros is '" + std::string(format.zeros) + "', but only integer codes have zero points");
  contract.Require(zeros != Zeros::kFloat || format.scale == "float",
                   prefix + "zeros is 'float', but there is no float type in '" + std::string(format.scale) +
                       "' scales for them to have");
  contract.Require(format.zero_point >= 0 && format.zero_point < int64_t{1} << code.bits,
                   prefix + "zero_point is " + std::to_string(format.zero_point) + ", which is no code");

  const int64_t tile_words = kTileK * kChunk * code.bits / 32;
  const int64_t experts = Extent(operands.packed, 0);
  const int64_t words = Extent(operands.packed, 2);
  const int64_t n = words / tile_words * kChunk;
  const int64_t group = format.group_size;
  contract.Require(k >= kTileK && k % kTileK == 0,
                   prefix + "the contraction extent is " + std::to_string(k) + ", not a multiple of 16");
  contract.Require(
      words >= tile_words && words % tile_words == 0,
      prefix + "packed has " + std::to_string(words) + " words a row, not a multiple of " + std::to_string(tile_words));
  contract.HasShape(operands.packed, (prefix + "packed").c_str(), ffi::DataType::S32, {experts, k / kTileK, words});
  contract.Require(group >= kTileK && group % kTileK == 0,
                   prefix + "group_size is " + std::to_string(group) + ", not a multiple of 16");
  if (!contract.ok()) return;
  const int64_t groups = CeilDiv(k, group);
  contract.HasExtents(operands.scales, (prefix + "scales").c_str(), {experts, groups, n});
  const std::string zeros_name = prefix + "zeros";
  const int64_t zero_words = n * code.bits / 32;
  if (zeros == Zeros::kNone) {
    contract.HasExtents(operands.zeros, zeros_name.c_str(), {0});
  } else if (zeros == Zeros::kInteger) {
    contract.HasShape(operands.zeros, zeros_name.c_str(), ffi::DataType::S32, {experts, groups, zero_words});
  } else {
    contract.HasShape(operands.zeros, zeros_name.c_str(), scale.dtype, {experts, groups, n});
  }
  contract.HasShapeOrIsAbsent(operands.global_scales, (prefix + "global_scales").c_str(), ffi::DataType::F32,
                              {experts, n / kChunk});
  contract.HasShapeOrIsAbsent(operands.bias, (prefix + "bias").c_str(), ffi::DataType::F32, {experts, n});
  if (!contract.ok()) return;

  experts_ = experts;
  matrix_.packed = static_cast<const int32_t*>(operands.packed.untyped_data());
  matrix_.scales = operands.scales.untyped_data();
  matrix_.zeros = operands.zeros.untyped_data();
  matrix_.k = k;
  matrix_.n = n;
  matrix_.groups = groups;
  matrix_.group_size = group;
  matrix_.zero_point = static_cast<float>(format.zero_point);
  matrix_.code = code.code;
  matrix_.scale_type = scale.scale;
  matrix_.zeros_type = zeros;
  packed_words_ = k / kTileK * words;
  scale_bytes_ = groups * n * scale.bytes;
  if (zeros == Zeros::kInteger) zero_bytes_ = groups * zero_words * 4;
  if (zeros == Zeros::kFloat) zero_bytes_ = scale_bytes_;
  if (!Contract::IsAbsent(operands.global_scales)) {
    global_scales_ = static_cast<const float*>(operands.global_scales.untyped_data());
  }
  if (!Contract::IsAbsent(operands.bias)) bias_ = static_cast<const float*>(operands.bias.untyped_data());
}

ExpertMatrix ExpertStack::Expert(int64_t expert) const {
  ExpertMatrix matrix = matrix_;
  matrix.packed += expert * packed_words_;
  matrix.scales = static_cast<const char*>(matrix.scales) + expert * scale_bytes_;
  matrix.zeros = static_cast<const char*>(matrix.zeros) + expert * zero_bytes_;
  return matrix;
}

void MultiplyExpert(const ExpertStack& stack, int64_t expert, Panel panel) {
  panel.weight = stack.Expert(expert);
  ActivePanelKernel()(panel);
  const float* global_scales = stack.GlobalScales(expert);
  const float* bias = stack.Bias(expert);
  if (global_scales == nullptr && bias == nullptr) return;
  float* out = panel.out;
  for (int r = 0; r < panel.rows; ++r) {
    for (int i = 0; i < panel.chunks; ++i, out += kChunk) {
      if (global_scales != nullptr) {
        for (int c = 0; c < kChunk; ++c) out[c] *= global_scales[panel.chunk[i]];
      }
      if (bias != nullptr) {
        const float* chunk_bias = bias + panel.chunk[i] * kChunk;
        for (int c = 0; c < kChunk; ++c) out[c] += chunk_bias[c];
      }
    }
  }
}

}  // namespace jax_marlin_moe::cpu
