// Checks of stacked expert matrices.
#include "ffi/matrix_operands.h"

#include "cpu/align.h"

namespace jax_marlin_moe {
namespace {

using cpu::Code;
using cpu::kTileK;
using cpu::kUnit;
using cpu::Scale;
using cpu::Zeros;

// A value of an attribute and what it means here.
template <class Type>
struct Spelling {
  std::string_view name;
  Type meaning;
};

struct CodeWidth {
  Code code;
  int bits;
};

#define JMM_CODE(name, call_name, exponent_bits) \
  , { call_name, {Code::k##name, 8} }
constexpr Spelling<CodeWidth> kCodes[] = {{"int4", {Code::kInt4, 4}},
                                          {"int8", {Code::kInt8, 8}},
                                          {"e2m1", {Code::kE2M1, 4}},
                                          {"bf16", {Code::kBf16, 16}},
                                          {"fp16", {Code::kFp16, 16}} JMM_FLOAT_BYTES(JMM_CODE)};
#undef JMM_CODE
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

// What `value` means; `contract` fails for a spelling that is not in the table.
template <class Type, size_t count>
Type Read(Contract& contract, const std::string& name, std::string_view value, const Spelling<Type> (&table)[count]) {
  std::string known;
  std::string_view last;
  for (const Spelling<Type>& row : table) {
    if (row.name == value) return row.meaning;
    if (row.name == last) continue;  // a name with several rows
    known += (known.empty() ? "" : ", ") + std::string(row.name);
    last = row.name;
  }
  contract.Require(false, name + " is " + Quoted(value) + "; there are: " + known);
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
                              ", in which " + Quoted(name) + " scales are not stored");
  return kScales[0].meaning;
}

}  // namespace

cpu::Element CheckElement(Contract& contract, const ffi::AnyBuffer& buffer, const char* name) {
  contract.HasDtype(buffer, name, {ffi::DataType::BF16, ffi::DataType::F16});
  return buffer.element_type() == ffi::DataType::F16 ? cpu::Element::kF16 : cpu::Element::kBf16;
}

cpu::ExpertStack CheckMatrix(Contract& contract, const std::string& prefix, int64_t k, const MatrixOperands& operands,
                             const MatrixFormat& format) {
  cpu::ExpertStack stack;
  const CodeWidth code = Read(contract, prefix + "code", format.code, kCodes);
  const Zeros zeros = Read(contract, prefix + "zeros", format.zeros, kZeros);
  const StoredScale scale = ReadScale(contract, prefix, format.scale, operands.scales);
  const bool integer_code = code.code == Code::kInt4 || code.code == Code::kInt8;
  contract.Require(zeros == Zeros::kNone || integer_code,
                   prefix + "zeros is " + Quoted(format.zeros) + ", but only integer codes have zero points");
  contract.Require(
      zeros != Zeros::kFloat || format.scale == "float",
      prefix + "zeros is 'float', but there is no float type in " + Quoted(format.scale) + " scales for them to have");
  contract.Require(format.zero_point >= 0 && format.zero_point < int64_t{1} << code.bits,
                   prefix + "zero_point is " + std::to_string(format.zero_point) + ", which is no code");

  const std::string packed_name = prefix + "packed";
  const int64_t tile_words = kTileK * kUnit * code.bits / 32;
  const int64_t experts = contract.Extent(operands.packed, packed_name, 0);
  const int64_t words = contract.Extent(operands.packed, packed_name, 2);
  const int64_t n = words / tile_words * kUnit;
  const int64_t group = format.group_size;
  contract.Require(experts != 0, packed_name + " has 0 experts; there must be at least one");
  contract.Require(k >= kTileK && k % kTileK == 0,
                   prefix + "the contraction extent is " + std::to_string(k) + ", not a multiple of 16");
  contract.Require(
      words >= tile_words && words % tile_words == 0,
      packed_name + " has " + std::to_string(words) + " words a row, not a multiple of " + std::to_string(tile_words));
  contract.HasShape(operands.packed, packed_name, ffi::DataType::S32, {experts, k / kTileK, words});
  contract.Require(group >= kTileK && group % kTileK == 0,
                   prefix + "group_size is " + std::to_string(group) + ", not a multiple of 16");
  contract.Require(group <= kMostElements, prefix + "group_size is " + std::to_string(group) + "; it must be at most " +
                                               std::to_string(kMostElements));
  // No other operand has more elements than packed has words, so their products need no check of their own.
  contract.Product("the size of " + packed_name, {experts, k / kTileK, words});
  if (!contract.ok()) return stack;
  const int64_t groups = cpu::CeilDiv(k, group);
  contract.HasExtents(operands.scales, prefix + "scales", {experts, groups, n});
  const std::string zeros_name = prefix + "zeros";
  const int64_t zero_words = n * code.bits / 32;
  if (zeros == Zeros::kNone) {
    contract.HasExtents(operands.zeros, zeros_name, {0});
  } else if (zeros == Zeros::kInteger) {
    contract.HasShape(operands.zeros, zeros_name, ffi::DataType::S32, {experts, groups, zero_words});
  } else {
    contract.HasShape(operands.zeros, zeros_name, scale.dtype, {experts, groups, n});
  }
  contract.HasShapeOrIsAbsent(operands.global_scales, prefix + "global_scales", ffi::DataType::F32,
                              {experts, n / kUnit});
  contract.HasShapeOrIsAbsent(operands.bias, prefix + "bias", ffi::DataType::F32, {experts, n});
  if (!contract.ok()) return stack;

  stack.experts = experts;
  stack.first.packed = static_cast<const int32_t*>(operands.packed.untyped_data());
  stack.first.scales = operands.scales.untyped_data();
  stack.first.zeros = operands.zeros.untyped_data();
  stack.first.k = k;
  stack.first.n = n;
  stack.first.groups = groups;
  stack.first.group_size = group;
  stack.first.zero_point = static_cast<float>(format.zero_point);
  stack.first.code = code.code;
  stack.first.scale_type = scale.scale;
  stack.first.zeros_type = zeros;
  stack.packed_words = k / kTileK * words;
  stack.scale_bytes = groups * n * scale.bytes;
  if (zeros == Zeros::kInteger) stack.zero_bytes = groups * zero_words * 4;
  if (zeros == Zeros::kFloat) stack.zero_bytes = stack.scale_bytes;
  if (!Contract::IsAbsent(operands.global_scales)) {
    stack.global_scales = static_cast<const float*>(operands.global_scales.untyped_data());
  }
  if (!Contract::IsAbsent(operands.bias)) stack.bias = static_cast<const float*>(operands.bias.untyped_data());
  return stack;
}

}  // namespace jax_marlin_moe
