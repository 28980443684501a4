#include "ffi/cuda_driver.h"

#include <dlfcn.h>

namespace jax_marlin_moe::cuda {
namespace {

struct Opened {
  Driver driver{};
  std::string reason;  // empty when complete
};

Opened Open() {
  Opened opened;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    opened.reason = "libcuda.so.1 cannot be opened: install the NVIDIA driver";
    return opened;
  }
  auto find = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
  };
  auto bind = [&](auto& function, const char* symbol) {
    find(function, symbol);
    if (function == nullptr) opened.reason = std::string("the NVIDIA driver lacks ") + symbol + ": update it";
  };
  Driver& d = opened.driver;
  bind(d.CtxGetCurrent, "cuCtxGetCurrent");
  bind(d.CtxGetDevice, "cuCtxGetDevice");
  bind(d.DeviceGetAttribute, "cuDeviceGetAttribute");
  bind(d.ModuleLoadData, "cuModuleLoadData");
  bind(d.ModuleUnload, "cuModuleUnload");
  bind(d.ModuleGetFunction, "cuModuleGetFunction");
  bind(d.FuncSetAttribute, "cuFuncSetAttribute");
  bind(d.FuncGetAttribute, "cuFuncGetAttribute");
  find(d.FuncGetParamInfo, "cuFuncGetParamInfo");
  bind(d.LaunchKernelEx, "cuLaunchKernelEx");
  bind(d.GetErrorString, "cuGetErrorString");
  return opened;
}

}  // namespace

const Driver* GetDriver(std::string* reason) {
  static const Opened opened = Open();
  *reason = opened.reason;
  return opened.reason.empty() ? &opened.driver : nullptr;
}

std::string Describe(const Driver& driver, Result result) {
  const char* text = nullptr;
  driver.GetErrorString(result, &text);
  return "CUDA error " + std::to_string(result) + (text ? std::string(": ") + text : std::string());
}

}  // namespace jax_marlin_moe::cuda
