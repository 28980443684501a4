// The programs that the process has loaded. XLA asks before every execution and every capture, so finding one again
// must cost no pass over its image.
//
// A program is known by its context and fingerprint, and beside it lies a copy of the bytes that it was loaded from.
// When attributes are seen at an address for the first time, all their bytes are compared with that copy; other bytes
// under the same fingerprint are an error, never the other's kernels. From then on a call that has the same address,
// sizes and fingerprint compares its whole contract and kernel names (some hundred words) and the first and last cache
// line of its image: 85 to 250 ns on a busy machine, the decoding of the attributes included (tests/native). Comparing
// all of an image of 100 KB takes microseconds, as much as a launch.
//
// An address says nothing once its executable is gone: memory may be handed out again. A new executable's call then
// passes unread only if it has, at that very address, the fingerprint, contract, names and image size of the program
// known there. That program's bytes had this fingerprint and it was compiled under this contract. So what runs is the
// undamaged program that the call claims to be, never kernels of other shapes or parameters: a damaged copy is
// replaced by its original.
#ifndef JAX_MARLIN_MOE_FFI_CUDA_REGISTRY_H_
#define JAX_MARLIN_MOE_FFI_CUDA_REGISTRY_H_

#include <map>
#include <memory>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "ffi/cuda_driver.h"
#include "ffi/cuda_program.h"

namespace jax_marlin_moe::cuda {

class Registry {
 public:
  // The program of a call in the current context, loaded at its first sight. Programs stay until the process ends:
  // executables that use them may live as long.
  ffi::ErrorOr<const Program*> FindOrLoad(const Driver& driver, const ProgramAttributes& attributes);

 private:
  using Key = std::pair<Context, int64_t>;             // of a fingerprint
  using Address = std::pair<Context, const uint8_t*>;  // of an image

  struct Entry {
    std::vector<uint8_t> image;
    std::vector<int64_t> contract;
    std::string kernels;
    int64_t fingerprint;
    std::unique_ptr<const Program> program;  // null where loading failed
    ffi::Error error;

    explicit Entry(const ProgramAttributes& attributes);
    bool AgreesAtAGlance(const ProgramAttributes& attributes) const;
    bool Equals(const ProgramAttributes& attributes) const;
    ffi::ErrorOr<const Program*> Outcome() const;
  };

  std::shared_mutex mutex_;
  std::map<Key, std::unique_ptr<const Entry>> programs_;
  // Programs that cannot be loaded, so that a caller who tries again costs no compilation by the driver.
  std::map<Key, std::unique_ptr<const Entry>> failures_;
  std::map<Address, const Entry*> seen_;  // entries of programs_
};

}  // namespace jax_marlin_moe::cuda

#endif  // JAX_MARLIN_MOE_FFI_CUDA_REGISTRY_H_
