// A 64-bit FNV-1a digest: the name under which loaded kernels are found again, and the tie between an image, the shapes
// it was compiled for and the kernels to launch. It guards against corruption, not against an adversary.
#ifndef JAX_MARLIN_MOE_FFI_FINGERPRINT_H_
#define JAX_MARLIN_MOE_FFI_FINGERPRINT_H_

#include <cstddef>
#include <cstdint>

namespace jax_marlin_moe {

class Fingerprint {
 public:
  void Add(const void* data, size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < size; ++i) value_ = (value_ ^ bytes[i]) * 0x100000001b3ull;
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325ull;
};

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_FINGERPRINT_H_
