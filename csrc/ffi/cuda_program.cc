#include "ffi/cuda_program.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

#include "ffi/fingerprint.h"
#include "ffi/handlers.h"

namespace jax_marlin_moe::cuda {
namespace {

// Reads the contract's fields in order and remembers whether it ran out of them.
class Reader {
 public:
  explicit Reader(ffi::Span<const int64_t> fields) : next_(fields.begin()), end_(fields.end()) {}

  // A field in [low, high]; outside, or past the end, the reader fails.
  int64_t Next(int64_t low, int64_t high) {
    if (failed_ || next_ == end_ || *next_ < low || *next_ > high) {
      failed_ = true;
      return low;
    }
    return *next_++;
  }
  bool complete() const { return !failed_ && next_ == end_; }

 private:
  const int64_t* next_;
  const int64_t* end_;
  bool failed_ = false;
};

constexpr int64_t kMaxExtent = int64_t{1} << 48;
constexpr int64_t kMaxBuffers = 64, kMaxKernels = 16, kMaxRank = 8;

ffi::AnyBuffer BufferAt(size_t index, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
  return index < args.size() ? *args.get<ffi::AnyBuffer>(index) : **rets.get<ffi::AnyBuffer>(index - args.size());
}

std::string Describe(int64_t dtype, const int64_t* extents, size_t rank) {
  std::string text = "dtype code " + std::to_string(dtype) + " [";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(extents[i]);
  return text + "]";
}

}  // namespace

ffi::ErrorOr<std::unique_ptr<Program>> Program::Load(const Driver& driver, ffi::Span<const uint8_t> cubin,
                                                     ffi::Span<const int64_t> contract, int64_t fingerprint) {
  Fingerprint actual;
  actual.Add(cubin.begin(), cubin.size());
  actual.Add(contract.begin(), contract.size() * sizeof(int64_t));
  if (static_cast<int64_t>(actual.value()) != fingerprint) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "jax_marlin_moe: the program's machine code and contract do not match their fingerprint; lower it again"));
  }

  auto program = std::make_unique<Program>();
  Reader reader(contract);
  reader.Next(kContractVersion, kContractVersion);
  const int64_t num_buffers = reader.Next(1, kMaxBuffers);
  const int64_t num_kernels = reader.Next(1, kMaxKernels);
  for (int64_t b = 0; b < num_buffers; ++b) {
    BufferShape shape{reader.Next(0, 255), {}};
    const int64_t rank = reader.Next(0, kMaxRank);
    for (int64_t i = 0; i < rank; ++i) shape.extents.push_back(reader.Next(0, kMaxExtent));
    program->buffers_.push_back(std::move(shape));
  }
  int device = 0, multiprocessors = 0;
  Result result = driver.CtxGetDevice(&device);
  if (result == 0) result = driver.DeviceGetAttribute(&multiprocessors, kDeviceMultiprocessorCount, device);
  if (result != 0) return ffi::Unexpected(ffi::Error::Internal("jax_marlin_moe: " + Describe(driver, result)));
  for (int64_t k = 0; k < num_kernels; ++k) {
    Kernel kernel{};
    kernel.threads = static_cast<unsigned>(reader.Next(1, 1024));
    kernel.shared_bytes = static_cast<unsigned>(reader.Next(0, 1 << 20));
    const int64_t most_blocks = reader.Next(1, INT32_MAX);
    const int64_t blocks_per_multiprocessor = reader.Next(0, 64);
    const int64_t cluster = reader.Next(1, 8);
    const int64_t blocks =
        blocks_per_multiprocessor ? std::min(most_blocks, blocks_per_multiprocessor * multiprocessors) : most_blocks;
    kernel.blocks = static_cast<unsigned>(blocks - blocks % cluster);
    kernel.overlaps_predecessor = reader.Next(0, 1) == 1;
    const int64_t parameters = reader.Next(1, kMaxBuffers);
    for (int64_t p = 0; p < parameters; ++p) {
      kernel.parameters.push_back(static_cast<int>(reader.Next(0, num_buffers - 1)));
    }
    program->kernels_.push_back(std::move(kernel));
  }
  if (!reader.complete()) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "jax_marlin_moe: the program's contract is malformed or of another version; lower it again"));
  }

  Module module = nullptr;
  result = driver.ModuleLoadData(&module, cubin.begin());
  if (result != 0) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "jax_marlin_moe: the kernels cannot be loaded on this device (compiled for another architecture?): " +
        Describe(driver, result)));
  }
  for (size_t k = 0; k < program->kernels_.size(); ++k) {
    Kernel& kernel = program->kernels_[k];
    const std::string name = "k" + std::to_string(k);
    int most_threads = 0;
    result = driver.ModuleGetFunction(&kernel.function, module, name.c_str());
    if (result == 0) {
      result = driver.FuncSetAttribute(kernel.function, kFunctionMaxDynamicSharedBytes,
                                       static_cast<int>(kernel.shared_bytes));
    }
    // Left to itself the driver may give shared memory too little for the blocks that the plan wants resident, and a
    // change of the split between two kernels keeps them from overlapping: all kernels ask for the most.
    if (result == 0) result = driver.FuncSetAttribute(kernel.function, kFunctionPreferredSharedCarveout, 100);
    if (result == 0) result = driver.FuncGetAttribute(&most_threads, kFunctionMaxThreadsPerBlock, kernel.function);
    if (result != 0) {
      return ffi::Unexpected(
          ffi::Error::InvalidArgument("jax_marlin_moe: kernel " + name + ": " + Describe(driver, result)));
    }
    if (static_cast<unsigned>(most_threads) < kernel.threads) {
      return ffi::Unexpected(ffi::Error::InvalidArgument("jax_marlin_moe: kernel " + name + " takes at most " +
                                                         std::to_string(most_threads) + " threads, the contract asks " +
                                                         std::to_string(kernel.threads)));
    }
  }
  return program;
}

ffi::Error Program::Check(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) const {
  if (args.size() + rets.size() != buffers_.size()) {
    return ffi::Error::InvalidArgument("jax_marlin_moe: the call has " + std::to_string(args.size() + rets.size()) +
                                       " buffers, its kernels were compiled for " + std::to_string(buffers_.size()));
  }
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const ffi::AnyBuffer buffer = BufferAt(i, args, rets);
    const auto dims = buffer.dimensions();
    const BufferShape& expected = buffers_[i];
    const bool equal = static_cast<int64_t>(buffer.element_type()) == expected.dtype &&
                       dims.size() == expected.extents.size() &&
                       std::equal(dims.begin(), dims.end(), expected.extents.begin());
    if (!equal) {
      return ffi::Error::InvalidArgument(
          "jax_marlin_moe: buffer " + std::to_string(i) + " is " +
          Describe(static_cast<int64_t>(buffer.element_type()), dims.begin(), dims.size()) +
          ", its kernels were compiled for " +
          Describe(expected.dtype, expected.extents.data(), expected.extents.size()));
    }
  }
  return ffi::Error::Success();
}

ffi::Error Program::Launch(const Driver& driver, Stream stream, const ffi::RemainingArgs& args,
                           const ffi::RemainingRets& rets) const {
  void* pointers[kMaxBuffers];
  for (size_t i = 0; i < buffers_.size(); ++i) pointers[i] = BufferAt(i, args, rets).untyped_data();
  for (const Kernel& kernel : kernels_) {
    void* parameters[kMaxBuffers];
    for (size_t p = 0; p < kernel.parameters.size(); ++p) parameters[p] = &pointers[kernel.parameters[p]];
    LaunchAttribute overlap{};
    overlap.id = kLaunchProgrammaticStreamSerialization;
    overlap.value.programmatic_stream_serialization_allowed = 1;
    LaunchConfig config{};
    config.grid_x = kernel.blocks;
    config.grid_y = config.grid_z = 1;
    config.block_x = kernel.threads;
    config.block_y = config.block_z = 1;
    config.shared_bytes = kernel.shared_bytes;
    config.stream = stream;
    config.attributes = &overlap;
    config.num_attributes = kernel.overlaps_predecessor ? 1 : 0;
    const Result result = driver.LaunchKernelEx(&config, kernel.function, parameters, nullptr);
    if (result != 0) return ffi::Error::Internal("jax_marlin_moe: launch failed: " + Describe(driver, result));
  }
  return ffi::Error::Success();
}

namespace {

// Loaded programs of the process, by context and fingerprint. Programs are never unloaded: executables that use them
// may live as long as the process.
class Registry {
 public:
  ffi::ErrorOr<const Program*> FindOrLoad(const Driver& driver, ffi::Span<const uint8_t> cubin,
                                          ffi::Span<const int64_t> contract, int64_t fingerprint) {
    Context context = nullptr;
    const Result result = driver.CtxGetCurrent(&context);
    if (result != 0 || context == nullptr) {
      return ffi::Unexpected(ffi::Error::Internal("jax_marlin_moe: no current CUDA context"));
    }
    const std::pair<Context, int64_t> key{context, fingerprint};
    {
      std::shared_lock<std::shared_mutex> lock(mutex_);
      auto found = programs_.find(key);
      if (found != programs_.end()) return found->second.get();
    }
    std::unique_lock<std::shared_mutex> lock(mutex_);
    auto found = programs_.find(key);
    if (found != programs_.end()) return found->second.get();
    auto loaded = Program::Load(driver, cubin, contract, fingerprint);
    if (!loaded.has_value()) return ffi::Unexpected(loaded.error());
    return programs_.emplace(key, std::move(loaded.value())).first->second.get();
  }

 private:
  std::shared_mutex mutex_;
  std::map<std::pair<Context, int64_t>, std::unique_ptr<Program>> programs_;
};

ffi::ErrorOr<const Program*> Find(ffi::Span<const uint8_t> cubin, ffi::Span<const int64_t> contract,
                                  int64_t fingerprint, const Driver** driver) {
  std::string reason;
  *driver = GetDriver(&reason);
  if (*driver == nullptr) return ffi::Unexpected(ffi::Error::Internal("jax_marlin_moe: " + reason));
  static Registry registry;
  return registry.FindOrLoad(**driver, cubin, contract, fingerprint);
}

// XLA calls this before every execution and every capture, so a program that is loaded costs one look-up.
ffi::Error Initialize(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary attributes) {
  auto cubin = attributes.get<ffi::Span<const uint8_t>>("cubin");
  auto contract = attributes.get<ffi::Span<const int64_t>>("contract");
  auto fingerprint = attributes.get<int64_t>("fingerprint");
  if (!cubin.has_value() || !contract.has_value() || !fingerprint.has_value()) {
    return ffi::Error::InvalidArgument("jax_marlin_moe: the call lacks cubin, contract or fingerprint");
  }
  const Driver* driver = nullptr;
  auto program = Find(cubin.value(), contract.value(), fingerprint.value(), &driver);
  return program.has_value() ? ffi::Error::Success() : program.error();
}

ffi::Error Execute(Stream stream, ffi::Span<const uint8_t> cubin, ffi::Span<const int64_t> contract,
                   int64_t fingerprint, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const Driver* driver = nullptr;
  auto program = Find(cubin, contract, fingerprint, &driver);
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
                                  .Attr<ffi::Span<const uint8_t>>("cubin")
                                  .Attr<ffi::Span<const int64_t>>("contract")
                                  .Attr<int64_t>("fingerprint")
                                  .RemainingArgs()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_marlin_moe
