// The few functions of the CUDA driver that launching needs, opened at run time: the module links no CUDA library
// and loads on machines that have none. Types and values are those of the driver's stable C ABI.
#ifndef JAX_MARLIN_MOE_FFI_CUDA_DRIVER_H_
#define JAX_MARLIN_MOE_FFI_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace jax_marlin_moe::cuda {

using Result = int;  // 0 is success
using Context = struct ContextHandle*;
using Module = struct ModuleHandle*;
using Function = struct FunctionHandle*;
using Stream = struct StreamHandle*;

inline constexpr Result kOutOfMemory = 2;
inline constexpr int kDeviceMultiprocessorCount = 16;
inline constexpr int kDeviceMaxSharedBytesPerBlock = 97;  // with a kernel's limit raised
inline constexpr int kFunctionMaxDynamicSharedBytes = 8;
inline constexpr int kFunctionPreferredSharedCarveout = 9;  // percent of a multiprocessor's largest
inline constexpr int kFunctionMaxThreadsPerBlock = 0;       // of a kernel with launch bounds: those
inline constexpr int kFunctionRequiredClusterWidth = 11;    // 0 where it was compiled for none
inline constexpr int kLaunchProgrammaticStreamSerialization = 6;

struct LaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int programmatic_stream_serialization_allowed;
  } value;
};
static_assert(sizeof(LaunchAttribute) == 72, "CUlaunchAttribute");

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  Stream stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};
static_assert(sizeof(LaunchConfig) == 56, "CUlaunchConfig");

struct Driver {
  Result (*CtxGetCurrent)(Context*);
  Result (*CtxGetDevice)(int*);
  Result (*DeviceGetAttribute)(int*, int, int);
  Result (*ModuleLoadData)(Module*, const void*);
  Result (*ModuleUnload)(Module);
  Result (*ModuleGetFunction)(Function*, Module, const char*);
  Result (*FuncSetAttribute)(Function, int, int);
  Result (*FuncGetAttribute)(int*, int, Function);
  Result (*FuncGetParamInfo)(Function, size_t, size_t*, size_t*);  // null before CUDA 12.4
  Result (*LaunchKernelEx)(const LaunchConfig*, Function, void**, void**);
  Result (*GetErrorString)(Result, const char**);
};

// The driver, or null with `reason` set where libcuda or one of the functions is missing.
const Driver* GetDriver(std::string* reason);

// "CUDA error 700: an illegal memory access was encountered"
std::string Describe(const Driver& driver, Result result);

}  // namespace jax_marlin_moe::cuda

#endif  // JAX_MARLIN_MOE_FFI_CUDA_DRIVER_H_
