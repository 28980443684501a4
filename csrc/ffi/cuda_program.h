// A compiled program: machine code for exactly one set of operand shapes, and the chain of kernels to launch.
//
// Every CUDA op is such a program, so one pair of handlers serves them all; what differs is decided when the call is
// lowered. `contract` is the flat int64 record below; `fingerprint` ties it to the cubin.
//
//   version, number of buffers (operands, then results), number of kernels,
//   per buffer: dtype code, rank, extents ...
//   per kernel: threads, dynamic shared bytes, most blocks, blocks per multiprocessor (0: no bound), blocks of a
//               cluster, 1 if it may start before its predecessor ends, number of parameters, buffer index of each ...
//
// Kernels are named k0, k1, ... in launch order.
#ifndef JAX_MARLIN_MOE_FFI_CUDA_PROGRAM_H_
#define JAX_MARLIN_MOE_FFI_CUDA_PROGRAM_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ffi/cuda_driver.h"
#include "xla/ffi/api/ffi.h"

namespace jax_marlin_moe::cuda {

namespace ffi = xla::ffi;

inline constexpr int64_t kContractVersion = 2;

struct BufferShape {
  int64_t dtype;
  std::vector<int64_t> extents;
};

struct Kernel {
  unsigned threads, shared_bytes, blocks;  // blocks: already bounded by the device
  bool overlaps_predecessor;
  std::vector<int> parameters;  // buffer indices
  Function function;
};

class Program {
 public:
  // Checks the contract against its fingerprint, loads the module into the current context, raises the kernels'
  // shared-memory limits. Called outside of stream capture.
  static ffi::ErrorOr<std::unique_ptr<Program>> Load(const Driver& driver, ffi::Span<const uint8_t> cubin,
                                                     ffi::Span<const int64_t> contract, int64_t fingerprint);

  // InvalidArgument where the buffers are not those that the kernels were compiled for.
  ffi::Error Check(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) const;

  ffi::Error Launch(const Driver& driver, Stream stream, const ffi::RemainingArgs& args,
                    const ffi::RemainingRets& rets) const;

 private:
  std::vector<BufferShape> buffers_;
  std::vector<Kernel> kernels_;
};

}  // namespace jax_marlin_moe::cuda

#endif  // JAX_MARLIN_MOE_FFI_CUDA_PROGRAM_H_
