// What makes a valid call slightly wrong, or absurd.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu_handler_case.h"

namespace jax_marlin_moe::fuzz {

// An extent that a program could state: near the old one, a usual one, or far beyond memory.
inline int64_t OtherExtent(Random& random, int64_t extent) {
  switch (random.Below(4)) {
    case 0:
      return extent > 0 && random.OneIn(2) ? extent - 1 : extent < (int64_t{1} << 62) ? extent + 1 : extent;
    case 1:
      return random.Of<int64_t>({0, 1, 2, 16, 64, 128});
    case 2:
      return extent / 2;
    default:
      return (int64_t{1} << random.Of<int64_t>({10, 30, 31, 32, 34, 47, 48, 49, 58, 60, 62})) - random.Below(2);
  }
}

inline void Change(Random& random, Case& out) {
  std::vector<Tensor>& list = random.OneIn(6) ? out.results : out.operands;
  Tensor& tensor = list[static_cast<size_t>(random.Below(static_cast<int64_t>(list.size())))];
  const size_t rank = tensor.shape.size();
  const size_t axis = rank == 0 ? 0 : static_cast<size_t>(random.Below(static_cast<int64_t>(rank)));
  switch (random.Below(10)) {
    case 0:
      tensor.type = random.Of<XLA_FFI_DataType>({XLA_FFI_DataType_S32, XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16,
                                                 XLA_FFI_DataType_F16, XLA_FFI_DataType_U8, XLA_FFI_DataType_S64,
                                                 XLA_FFI_DataType_PRED});
      return;
    case 1:
      tensor.shape.insert(tensor.shape.begin() + static_cast<int64_t>(axis), random.Below(3));
      return;
    case 2:
      if (rank > 0) tensor.shape.erase(tensor.shape.begin() + static_cast<int64_t>(axis));
      return;
    case 3:
      if (rank > 0) tensor.shape[axis] = OtherExtent(random, tensor.shape[axis]);
      return;
    case 4:
    case 5: {  // the same extent everywhere, so that operands still agree; perhaps with another one that becomes zero
      if (rank == 0) return;
      const int64_t before = tensor.shape[axis], now = OtherExtent(random, before);
      const int64_t empty =
          random.OneIn(2) ? tensor.shape[static_cast<size_t>(random.Below(static_cast<int64_t>(rank)))] : -1;
      for (std::vector<Tensor>* tensors : {&out.operands, &out.results}) {
        for (Tensor& other : *tensors) {
          for (int64_t& extent : other.shape) extent = extent == before ? now : extent == empty ? 0 : extent;
        }
      }
      return;
    }
    case 6: {
      Tensor& other = out.operands[static_cast<size_t>(random.Below(static_cast<int64_t>(out.operands.size())))];
      std::swap(tensor, other);
      return;
    }
    case 7:
      if (random.OneIn(2)) {
        list.push_back(Tensor(tensor));
      } else {
        list.pop_back();
      }
      if (out.operands.empty() || out.results.empty()) list.push_back({XLA_FFI_DataType_S32, {1}});
      return;
    default: {
      Attribute& attribute =
          out.attributes[static_cast<size_t>(random.Below(static_cast<int64_t>(out.attributes.size())))];
      if (attribute.kind == XLA_FFI_AttrType_STRING) {
        attribute.text = random.Of<std::string>({"", "int4", "int8", "e2m1", "e4m3", "e8m0", "float", "none", "integer",
                                                 "relu2", "silu", "static_fp8", "swiglu", std::string("int4\0", 5)});
      } else if (attribute.kind == XLA_FFI_AttrType_ARRAY) {
        attribute.floats.assign(static_cast<size_t>(random.Below(5)), 1e38f);
        if (!attribute.places.empty()) {
          const size_t place = static_cast<size_t>(random.Below(static_cast<int64_t>(attribute.places.size())));
          if (random.OneIn(3))
            attribute.places.pop_back();
          else
            attribute.places[place] = random.OneIn(2) ? random.Below(16) - 1 : OtherExtent(random, 3);
        }
      } else if (attribute.type == XLA_FFI_DataType_PRED) {
        attribute.number ^= 1;
      } else {
        const int64_t extent = OtherExtent(random, attribute.number < 0 ? 0 : attribute.number);
        attribute.number = random.OneIn(8) ? -extent : extent;
      }
    }
  }
}

}  // namespace jax_marlin_moe::fuzz
