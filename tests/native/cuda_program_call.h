// Calls the handlers of CUDA programs on fake_libcuda: what a call bears, and the frames of both stages.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "ffi/cuda_handlers.h"
#include "ffi/fingerprint.h"
#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

namespace cuda_program_fuzz {

inline XLA_FFI_Error* Create(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->errc, args->message}; }
inline void Destroy(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
inline XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = reinterpret_cast<void*>(0x20);
  return nullptr;
}

inline void Require(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// The fake driver's notes.
struct Notes {
  long *loads, *live_modules, *launches, *wild_pointers, *bad_launches;
  int* memory_is_short;
  void** context;
  const char* last_tag;
  bool counts_parameters;

  Notes() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    Require(library != nullptr, "libcuda.so.1 is not on LD_LIBRARY_PATH");
    auto bind = [&](auto& pointer, const char* name) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(dlsym(library, name));
      Require(pointer != nullptr, std::string("libcuda.so.1 is not the fake one: no ") + name);
    };
    bind(loads, "fake_loads");
    bind(live_modules, "fake_live_modules");
    bind(launches, "fake_launches");
    bind(wild_pointers, "fake_wild_pointers");
    bind(bad_launches, "fake_bad_launches");
    bind(memory_is_short, "fake_memory_is_short");
    bind(context, "fake_context");
    bind(last_tag, "fake_last_tag");
    counts_parameters = dlsym(library, "cuFuncGetParamInfo") != nullptr;
  }
};

struct Launched {
  int64_t threads = 64, shared_bytes = 0, most_blocks = 7, blocks_per_multiprocessor = 0, cluster = 1, overlaps = 0;
  std::vector<int64_t> parameters = {0};
  int64_t offset = 0;  // in the buffers of all of them
  int64_t compiled_parameters = 1, compiled_threads = 64, compiled_cluster = 1;
};

// What a call bears, with buffers that agree.
struct Call {
  std::string image, kernels;
  std::vector<int64_t> contract;
  int64_t fingerprint = 0;
  std::vector<std::vector<int64_t>> shapes;
  std::string tag;

  void Sign() {
    jax_marlin_moe::Fingerprint value;
    value.Add(image.data(), image.size());
    value.Add(contract.data(), contract.size() * 8);
    value.Add(kernels.data(), kernels.size());
    fingerprint = static_cast<int64_t>(value.value());
  }
};

inline Call MakeCall(const std::string& tag, const std::vector<std::vector<int64_t>>& shapes,
                     const std::vector<Launched>& kernels, int64_t version = 4,
                     const std::vector<int64_t>& rows_of_token = {}) {
  Call call;
  call.tag = tag;
  call.shapes = shapes;
  call.image = "FAKE " + tag;
  call.contract = {version, static_cast<int64_t>(shapes.size()), static_cast<int64_t>(kernels.size())};
  for (size_t b = 0; b < shapes.size(); ++b) {
    const auto& shape = shapes[b];
    call.contract.insert(call.contract.end(), {11, static_cast<int64_t>(shape.size())});
    if (version > 4) call.contract.push_back(b < rows_of_token.size() ? rows_of_token[b] : 0);
    call.contract.insert(call.contract.end(), shape.begin(), shape.end());
  }
  for (size_t k = 0; k < kernels.size(); ++k) {
    const Launched& kernel = kernels[k];
    const std::string name = "jmm_stage" + std::to_string(k);
    call.kernels += (k ? " " : "") + name;
    call.image += " " + name + "," + std::to_string(kernel.compiled_parameters) + "," +
                  std::to_string(kernel.compiled_threads) + "," + std::to_string(kernel.compiled_cluster);
    call.contract.insert(call.contract.end(),
                         {kernel.threads, kernel.shared_bytes, kernel.most_blocks, kernel.blocks_per_multiprocessor,
                          kernel.cluster, kernel.overlaps, static_cast<int64_t>(kernel.parameters.size())});
    for (const int64_t parameter : kernel.parameters) {
      call.contract.push_back(parameter);
      if (version > 3) call.contract.push_back(kernel.offset);
    }
  }
  call.image += '\0';
  call.Sign();
  return call;
}

inline Call OneKernel(const std::string& tag, const std::function<void(Launched&)>& change = [](Launched&) {}) {
  Launched kernel;
  change(kernel);
  return MakeCall(tag, {{2, 3}, {5}}, {kernel});
}

// Attributes as XLA holds them: heap memory of exactly their size, so that a read past it is seen.
class Executable {
 public:
  explicit Executable(const Call& call)
      : call_(call), image_(new uint8_t[call.image.size()]), contract_(new int64_t[call.contract.size()]) {
    Overwrite(call);
  }

  // Other bytes of the same sizes in the same place.
  void Overwrite(const Call& call) {
    Require(call.image.size() == call_.image.size() && call.contract.size() == call_.contract.size(), "equal sizes");
    call_ = call;
    if (!call.image.empty()) std::memcpy(image_.get(), call.image.data(), call.image.size());
    if (!call.contract.empty()) std::memcpy(contract_.get(), call.contract.data(), call.contract.size() * 8);
  }

  // "" or the error; runs both stages.
  std::string Run() const {
    const std::string text = Stage(jax_marlin_moe::CudaInitialize, XLA_FFI_ExecutionStage_INITIALIZE);
    return text.empty() ? Stage(jax_marlin_moe::CudaExecute, XLA_FFI_ExecutionStage_EXECUTE) : text;
  }

  std::string Stage(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*), XLA_FFI_ExecutionStage stage) const {
    static XLA_FFI_Api api = [] {
      XLA_FFI_Api made{};
      made.struct_size = sizeof(made);
      made.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
      made.XLA_FFI_Error_Create = Create;
      made.XLA_FFI_Error_Destroy = Destroy;
      made.XLA_FFI_Stream_Get = GetStream;
      return made;
    }();
    std::vector<XLA_FFI_Buffer> buffers;
    for (const auto& shape : call_.shapes) {
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType_F32, reinterpret_cast<void*>(0x40),
                         static_cast<int64_t>(shape.size()), const_cast<int64_t*>(shape.data())});
    }
    std::vector<void*> arguments, results;
    for (size_t i = 0; i < buffers.size(); ++i) {
      (buffers.size() > 1 && i + 1 == buffers.size() ? results : arguments).push_back(&buffers[i]);
    }
    std::vector<XLA_FFI_ArgType> argument_types(arguments.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);
    int64_t fingerprint = call_.fingerprint;
    XLA_FFI_Array contract{XLA_FFI_DataType_S64, call_.contract.size(), contract_.get()};
    XLA_FFI_Array image{XLA_FFI_DataType_U8, call_.image.size(), image_.get()};
    XLA_FFI_Scalar scalar{XLA_FFI_DataType_S64, &fingerprint};
    XLA_FFI_ByteSpan kernels{call_.kernels.data(), call_.kernels.size()};
    XLA_FFI_ByteSpan names[] = {{"contract", 8}, {"cubin", 5}, {"fingerprint", 11}, {"kernels", 7}};
    XLA_FFI_ByteSpan* name_pointers[] = {&names[0], &names[1], &names[2], &names[3]};
    XLA_FFI_AttrType types[] = {XLA_FFI_AttrType_ARRAY, XLA_FFI_AttrType_ARRAY, XLA_FFI_AttrType_SCALAR,
                                XLA_FFI_AttrType_STRING};
    void* values[] = {&contract, &image, &scalar, &kernels};

    int context = 0;
    XLA_FFI_CallFrame frame{};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &api;
    frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(&context);
    frame.stage = stage;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(arguments.size()), argument_types.data(),
                  arguments.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(results.size()), result_types.data(),
                  results.data()};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, 4, types, name_pointers, values};
    std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
    return error == nullptr ? "" : std::to_string(error->code) + " " + error->message;
  }

 private:
  Call call_;
  std::unique_ptr<uint8_t[]> image_;
  std::unique_ptr<int64_t[]> contract_;
};

inline std::string Run(const Call& call) { return Executable(call).Run(); }

}  // namespace cuda_program_fuzz
