// What a call of a CPU handler has, and the numbers that it is drawn by.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_marlin_moe::fuzz {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u) {}

  uint64_t Bits() {  // xorshift*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1Du;
  }
  int64_t Below(int64_t bound) { return static_cast<int64_t>((Bits() >> 11) % static_cast<uint64_t>(bound)); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  template <class Type>
  Type Of(const std::vector<Type>& values) {
    return values[static_cast<size_t>(Below(static_cast<int64_t>(values.size())))];
  }

 private:
  uint64_t state_;
};

// How the data of an operand is drawn.
enum class Content { kNumbers, kWords, kIds, kSlots, kCount };

struct Tensor {
  XLA_FFI_DataType type;
  std::vector<int64_t> shape;
  Content content = Content::kNumbers;
};

struct Attribute {
  std::string name;
  XLA_FFI_AttrType kind = XLA_FFI_AttrType_SCALAR;
  XLA_FFI_DataType type = XLA_FFI_DataType_S64;
  int64_t number = 0;
  std::string text;
  std::vector<float> floats;
  std::vector<int64_t> places;  // of an array of int64
};

inline Attribute Number(std::string name, int64_t value) {
  Attribute attribute;
  attribute.name = std::move(name);
  attribute.number = value;
  return attribute;
}

inline Attribute Text(std::string name, std::string value) {
  Attribute attribute;
  attribute.name = std::move(name);
  attribute.kind = XLA_FFI_AttrType_STRING;
  attribute.text = std::move(value);
  return attribute;
}

inline Attribute Flag(std::string name, bool value) {
  Attribute attribute = Number(std::move(name), value);
  attribute.type = XLA_FFI_DataType_PRED;
  return attribute;
}

// A float32 by its bits.
inline Attribute Float(std::string name, int64_t bits) {
  Attribute attribute = Number(std::move(name), bits);
  attribute.type = XLA_FFI_DataType_F32;
  return attribute;
}

struct Case {
  int op = 0;
  std::vector<Tensor> operands;
  std::vector<Tensor> results;
  std::vector<Attribute> attributes;  // by name, as XLA orders them
};

struct Op {
  const char* name;
  void (*draw)(Random& random, Case& out);
};

}  // namespace jax_marlin_moe::fuzz
