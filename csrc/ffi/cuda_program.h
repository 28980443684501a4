// A compiled program: an image for one set of operand shapes, and the chain of kernels to launch. Some buffers may have
// fewer rows than they were compiled for, all of them for the same number of tokens; kernels get that number by value.
//
// Every CUDA op is such a program, so one pair of handlers runs them all; what differs is decided when the call is
// lowered. The image is machine code, or PTX that the driver compiles: loading a program is running code. What is
// checked here catches damage and mistakes, not an author who means harm.
//
// `kernels` holds the symbols in launch order, separated by spaces; `contract` is the flat int64 record below;
// `fingerprint` ties both to the image.
//
//   version, number of buffers (operands, then results), number of kernels,
//   per buffer: dtype code, rank, rows for each token (0: the first extent is exact, else the most), extents ...
//   per kernel: threads, dynamic shared bytes, most blocks, blocks per multiprocessor (0: no bound), blocks of a
//               cluster, 1 if it may start before its predecessor ends, number of parameters, of each the buffer's
//               index and the bytes of it that lie before what the parameter points to, or the number of buffers and 0
//               for the number of tokens ...
//
// Version 4 has no rows for each token: all extents are exact. Nor has version 3, in which parameters are where their
// buffers begin.
#ifndef JAX_MARLIN_MOE_FFI_CUDA_PROGRAM_H_
#define JAX_MARLIN_MOE_FFI_CUDA_PROGRAM_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ffi/cuda_driver.h"
#include "xla/ffi/api/ffi.h"

namespace jax_marlin_moe::cuda {

namespace ffi = xla::ffi;

inline constexpr int64_t kOldestContractVersion = 3, kFirstCountingVersion = 5, kContractVersion = 5;

// The attributes of a call; they point into memory of the executable.
struct ProgramAttributes {
  ffi::Span<const uint8_t> image;
  ffi::Span<const int64_t> contract;
  std::string_view kernels;
  int64_t fingerprint;

  // Whether the fingerprint is that of the bytes; reads all of them.
  bool MatchFingerprint() const;
};

struct BufferShape {
  int64_t dtype;
  int64_t rows_of_token;  // 0 where the first extent is exact
  std::vector<int64_t> extents;
};

struct Parameter {
  int buffer;
  int64_t offset;  // in bytes
};

struct Kernel {
  std::string name;
  unsigned threads, shared_bytes, cluster, blocks;  // blocks: already bounded by the device
  bool overlaps_predecessor;
  std::vector<Parameter> parameters;  // of a buffer past the last one: the number of tokens
  Function function;
};

// A loaded module; unloads it.
class LoadedModule {
 public:
  explicit LoadedModule(const Driver& driver) : driver_(driver) {}
  LoadedModule(const LoadedModule&) = delete;
  LoadedModule& operator=(const LoadedModule&) = delete;
  ~LoadedModule() {
    if (module_ != nullptr) driver_.ModuleUnload(module_);
  }

  Result Load(const void* image) { return driver_.ModuleLoadData(&module_, image); }
  Module get() const { return module_; }

 private:
  const Driver& driver_;
  Module module_ = nullptr;
};

class Program {
 public:
  // Reads the contract, loads the module into the current context, compares each kernel with what the contract says
  // of it and raises its shared-memory limit. Called outside of stream capture. InvalidArgument is the program's fault
  // and will be so again; other errors may pass.
  static ffi::ErrorOr<std::unique_ptr<Program>> Load(const Driver& driver, const ProgramAttributes& attributes);

  // InvalidArgument where the buffers are not those that the kernels were compiled for.
  ffi::Error Check(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) const;

  ffi::Error Launch(const Driver& driver, Stream stream, const ffi::RemainingArgs& args,
                    const ffi::RemainingRets& rets) const;

  explicit Program(const Driver& driver) : module_(driver) {}

 private:
  ffi::Error Read(const Driver& driver, const ProgramAttributes& attributes);
  // Buffers and kernels without their names; false where a field is out of range or there are too few or too many.
  bool ReadContract(ffi::Span<const int64_t> contract, int multiprocessors);
  ffi::Error Bind(const Driver& driver, Kernel& kernel) const;

  // Of the call with these buffers; 0 where all extents are exact.
  int64_t CountTokens(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) const;

  LoadedModule module_;
  std::vector<BufferShape> buffers_;
  std::vector<Kernel> kernels_;
};

}  // namespace jax_marlin_moe::cuda

#endif  // JAX_MARLIN_MOE_FFI_CUDA_PROGRAM_H_
