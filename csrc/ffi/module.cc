// The Python module: hands the FFI handlers to jax.ffi and says which FFI version they speak. Nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include "ffi/cpu_op.h"
#include "ffi/cuda_handlers.h"
#include "ffi/fingerprint.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;

namespace jax_marlin_moe {
namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict Handlers() {
  nb::dict handlers;
  auto add = [&](const char* op, const char* platform, int version, nb::object handler) {
    handlers[nb::make_tuple(op, platform)] = nb::make_tuple(version, handler);
  };
  for (const CpuOp* op = CpuOp::First(); op != nullptr; op = op->next) {
    add(op->name, "cpu", op->version, Capsule(op->handler));
  }
  nb::dict program;
  program["initialize"] = Capsule(CudaInitialize);
  program["execute"] = Capsule(CudaExecute);
  add("program", "cuda", 2, program);
  return handlers;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("handlers", &Handlers, "(version, FFI handlers) by (op, platform)");
  m.def("ffi_api_version", [] { return std::make_pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
  m.def(
      "fingerprint",
      [](nb::bytes cubin, nb::bytes contract) {
        Fingerprint fingerprint;
        fingerprint.Add(cubin.data(), cubin.size());
        fingerprint.Add(contract.data(), contract.size());
        return static_cast<int64_t>(fingerprint.value());
      },
      nb::arg("cubin"), nb::arg("contract"), "Ties machine code to the shapes that it was compiled for");
}

}  // namespace jax_marlin_moe
