// Checks that handlers make on what XLA hands them, before anything is read or launched.
//
// A program may have been exported, edited or corrupted since Python traced it, so each handler holds its
// operands' types, ranks and extents against each other and returns InvalidArgument on the first mismatch.
//
// Shapes of buffers without elements are numbers that no memory backs. So a handler takes an extent only from
// Contract::Extent and multiplies two only in Contract::Product: both fail above kMostElements.
#ifndef JAX_MARLIN_MOE_FFI_CONTRACT_H_
#define JAX_MARLIN_MOE_FFI_CONTRACT_H_

#include <cstdint>
#include <initializer_list>
#include <new>
#include <string>
#include <string_view>

#include "cpu/scratch.h"
#include "xla/ffi/api/ffi.h"

namespace jax_marlin_moe {

namespace ffi = xla::ffi;

// No extent and no number of elements may exceed it. Memories are smaller, and with it bytes and sums of a few fit
// int64.
constexpr int64_t kMostElements = int64_t{1} << 48;

// An attribute's text for messages: those end at a NUL, and a terminal may obey other control characters.
inline std::string Quoted(std::string_view text) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string quoted = "'";
  for (const char character : text) {
    const auto byte = static_cast<unsigned char>(character);
    if (byte < 0x20 || byte == 0x7F) {
      quoted += std::string("\\x") + kDigits[byte >> 4] + kDigits[byte & 15];
    } else {
      quoted += character;
    }
  }
  return quoted + "'";
}

// Collects the first failed check; later ones are skipped.
class Contract {
 public:
  explicit Contract(const char* op) : op_(op) {}

  Contract& Require(bool condition, const std::string& message) {
    if (error_.empty() && !condition) error_ = std::string(op_) + ": " + message;
    return *this;
  }

  Contract& HasShape(const ffi::AnyBuffer& buffer, const std::string& name, ffi::DataType dtype,
                     std::initializer_list<int64_t> shape) {
    return HasDtype(buffer, name, {dtype}).HasExtents(buffer, name, shape);
  }

  // A zero-size vector means that the operand was not given.
  Contract& HasShapeOrIsAbsent(const ffi::AnyBuffer& buffer, const std::string& name, ffi::DataType dtype,
                               std::initializer_list<int64_t> shape) {
    return IsAbsent(buffer) ? *this : HasShape(buffer, name, dtype, shape);
  }

  Contract& HasDtype(const ffi::AnyBuffer& buffer, const std::string& name,
                     std::initializer_list<ffi::DataType> allowed) {
    for (ffi::DataType dtype : allowed) {
      if (buffer.element_type() == dtype) return *this;
    }
    return Require(false, name + " has dtype code " + std::to_string(static_cast<int>(buffer.element_type())) +
                              ", which this call does not take");
  }

  Contract& HasExtents(const ffi::AnyBuffer& buffer, const std::string& name, std::initializer_list<int64_t> shape) {
    auto dims = buffer.dimensions();
    bool equal = dims.size() == shape.size();
    size_t axis = 0;
    for (int64_t extent : shape) {
      if (equal) equal = dims[axis++] == extent;
    }
    return Require(equal, name + " has shape " + Describe(dims.begin(), dims.end()) + ", expected " +
                              Describe(shape.begin(), shape.end()));
  }

  // The extent of axis `axis`, or -1 where the buffer has no such axis: a rank error then surfaces in HasExtents.
  int64_t Extent(const ffi::AnyBuffer& buffer, const std::string& name, size_t axis) {
    auto dims = buffer.dimensions();
    if (axis >= dims.size()) return -1;
    const bool bounded = dims[axis] >= 0 && dims[axis] <= kMostElements;
    Require(bounded, name + " has shape " + Describe(dims.begin(), dims.end()) + "; extents must be at most " +
                         std::to_string(kMostElements));
    return bounded ? dims[axis] : -1;
  }

  // The product of extents that are at most kMostElements, or -1 where one of them is negative or the product is more.
  int64_t Product(const std::string& name, std::initializer_list<int64_t> factors) {
    int64_t product = 1;
    for (int64_t factor : factors) {
      if (factor < 0) return -1;
      if (factor > 0 && product > kMostElements / factor) {
        Require(false, name + " is the product of " + Describe(factors.begin(), factors.end()) +
                           "; it must be at most " + std::to_string(kMostElements));
        return -1;
      }
      product *= factor;
    }
    return product;
  }

  bool ok() const { return error_.empty(); }
  ffi::Error ToError() const { return ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(error_); }

  // The result of a call whose checks have passed: does its work, in which allocations may fail.
  template <typename Work>
  ffi::Error Run(const Work& work) const {
    if (!ok()) return ToError();
    try {
      work();
    } catch (const cpu::ScratchExhausted& error) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                        std::string(op_) + ": allocating " + std::to_string(error.bytes()) +
                            " bytes of scratch memory failed; free memory, or pass fewer tokens to a call");
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                        std::string(op_) + ": allocating a few bytes failed; free memory");
    }
    return ffi::Error::Success();
  }

  static bool IsAbsent(const ffi::AnyBuffer& buffer) {
    auto dims = buffer.dimensions();
    return dims.size() == 1 && dims[0] == 0;
  }

 private:
  template <typename Iterator>
  static std::string Describe(Iterator begin, Iterator end) {
    std::string text = "[";
    for (Iterator it = begin; it != end; ++it) text += (it == begin ? "" : ", ") + std::to_string(*it);
    return text + "]";
  }

  const char* op_;
  std::string error_;
};

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_CONTRACT_H_
