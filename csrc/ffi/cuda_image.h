// What is handed to the driver, which is told no length: the extent of an image is checked before.
#ifndef JAX_MARLIN_MOE_FFI_CUDA_IMAGE_H_
#define JAX_MARLIN_MOE_FFI_CUDA_IMAGE_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace jax_marlin_moe::cuda {

// Empty where `size` bytes hold all that the image refers to: machine code as a 64-bit little-endian ELF file whose
// headers, segments and sections lie within it, or PTX as text that ends with its only NUL. Otherwise what is wrong.
std::string ImageFault(const uint8_t* image, size_t size);

}  // namespace jax_marlin_moe::cuda

#endif  // JAX_MARLIN_MOE_FFI_CUDA_IMAGE_H_
