// Checks that handlers make on what XLA hands them, before anything is read or launched.
//
// A program may have been exported, edited or corrupted since Python traced it, so each handler holds its
// operands' types, ranks and extents against each other and returns InvalidArgument on the first mismatch.
#ifndef JAX_MARLIN_MOE_FFI_CONTRACT_H_
#define JAX_MARLIN_MOE_FFI_CONTRACT_H_

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_marlin_moe {

namespace ffi = xla::ffi;

// Collects the first failed check; later ones are skipped.
class Contract {
 public:
  explicit Contract(const char* op) : op_(op) {}

  Contract& Require(bool condition, const std::string& message) {
    if (error_.empty() && !condition) error_ = std::string(op_) + ": " + message;
    return *this;
  }

  Contract& HasShape(const ffi::AnyBuffer& buffer, const char* name, ffi::DataType dtype,
                     std::initializer_list<int64_t> shape) {
    return HasDtype(buffer, name, {dtype}).HasExtents(buffer, name, shape);
  }

  // A zero-size vector stands for an operand that was not given.
  Contract& HasShapeOrIsAbsent(const ffi::AnyBuffer& buffer, const char* name, ffi::DataType dtype,
                               std::initializer_list<int64_t> shape) {
    return IsAbsent(buffer) ? *this : HasShape(buffer, name, dtype, shape);
  }

  Contract& HasDtype(const ffi::AnyBuffer& buffer, const char* name, std::initializer_list<ffi::DataType> allowed) {
    for (ffi::DataType dtype : allowed) {
      if (buffer.element_type() == dtype) return *this;
    }
    return Require(false, std::string(name) + " has dtype code " +
                              std::to_string(static_cast<int>(buffer.element_type())) +
                              ", which this call does not take");
  }

  Contract& HasExtents(const ffi::AnyBuffer& buffer, const char* name, std::initializer_list<int64_t> shape) {
    auto dims = buffer.dimensions();
    bool equal = dims.size() == shape.size();
    size_t axis = 0;
    for (int64_t extent : shape) {
      if (equal) equal = dims[axis++] == extent;
    }
    return Require(equal, std::string(name) + " has shape " + Describe(dims.begin(), dims.end()) + ", expected " +
                              Describe(shape.begin(), shape.end()));
  }

  bool ok() const { return error_.empty(); }
  ffi::Error ToError() const { return ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument(error_); }

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

// The extent of axis `axis`, or -1 where the buffer has no such axis: a rank error then surfaces in HasExtents.
inline int64_t Extent(const ffi::AnyBuffer& buffer, size_t axis) {
  auto dims = buffer.dimensions();
  return axis < dims.size() ? dims[axis] : -1;
}

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_CONTRACT_H_
