// The pair of handlers behind every CUDA op.
#include "ffi/cuda_handlers.h"

#include "ffi/cuda_program.h"
#include "ffi/cuda_registry.h"

namespace jax_marlin_moe::cuda {
namespace {

ffi::ErrorOr<const Program*> Find(const ProgramAttributes& attributes, const Driver** driver) {
  std::string reason;
  *driver = GetDriver(&reason);
  if (*driver == nullptr) return ffi::Unexpected(ffi::Error::Internal("jax_marlin_moe: " + reason));
  // Never destroyed: at the end of a process the driver may be gone before its modules.
  static Registry& registry = *new Registry;
  return registry.FindOrLoad(**driver, attributes);
}

ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  auto image = attributes.get<ffi::Span<const uint8_t>>("cubin");
  auto contract = attributes.get<ffi::Span<const int64_t>>("contract");
  auto kernels = attributes.get<std::string_view>("kernels");
  auto fingerprint = attributes.get<int64_t>("fingerprint");
  if (!image.has_value() || !contract.has_value() || !kernels.has_value() || !fingerprint.has_value()) {
    return ffi::Error::InvalidArgument("jax_marlin_moe: the call lacks cubin, contract, kernels or fingerprint");
  }
  const Driver* driver = nullptr;
  auto program = Find({image.value(), contract.value(), kernels.value(), fingerprint.value()}, &driver);
  return program.has_value() ? ffi::Error::Success() : program.error();
}

ffi::Error Execute(Stream stream, ffi::Span<const uint8_t> image, ffi::Span<const int64_t> contract,
                   std::string_view kernels, int64_t fingerprint, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const Driver* driver = nullptr;
  auto program = Find({image, contract, kernels, fingerprint}, &driver);
  if (!program.has_value()) return program.error();
  ffi::Error error = program.value()->Check(args, rets);
  return error.failure() ? error : program.value()->Launch(*driver, stream, args, rets);
}

}  // namespace
}  // namespace jax_marlin_moe::cuda

namespace jax_marlin_moe {

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CudaInitialize, cuda::Initialize,
    ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(CudaExecute, cuda::Execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cuda::Stream>>()
                                  .Attr<ffi::Span<const uint8_t>>("cubin")  // or PTX text
                                  .Attr<ffi::Span<const int64_t>>("contract")
                                  .Attr<std::string_view>("kernels")
                                  .Attr<int64_t>("fingerprint")
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_marlin_moe
