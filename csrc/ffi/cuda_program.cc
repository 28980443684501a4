#include "ffi/cuda_program.h"

#include <algorithm>
#include <utility>

#include "ffi/cuda_image.h"
#include "ffi/fingerprint.h"

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
// Pointers that kernels of drivers too old to count parameters may take: 4 KB of them.
constexpr size_t kMaxUncountedParameters = 512;

ffi::AnyBuffer BufferAt(size_t index, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
  return index < args.size() ? *args.get<ffi::AnyBuffer>(index) : **rets.get<ffi::AnyBuffer>(index - args.size());
}

// Of an element of a type that programs take; 0 of another one.
int64_t BytesOf(int64_t dtype) {
  switch (static_cast<XLA_FFI_DataType>(dtype)) {
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_U8:
    case XLA_FFI_DataType_F8E4M3FN:
      return 1;
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16:
      return 2;
    case XLA_FFI_DataType_S32:
    case XLA_FFI_DataType_F32:
      return 4;
    default:
      return 0;
  }
}

// The largest offset at which a buffer still has a byte; 0 where it has none, or more than a memory.
int64_t LastByte(const BufferShape& shape) {
  int64_t bytes = BytesOf(shape.dtype);
  for (const int64_t extent : shape.extents) {
    if (extent > 0 && bytes > kMaxExtent / extent) return 0;
    bytes *= extent;
  }
  return std::max<int64_t>(bytes - 1, 0);
}

std::string Describe(int64_t dtype, const int64_t* extents, size_t rank) {
  std::string text = "dtype code " + std::to_string(dtype) + " [";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(extents[i]);
  return text + "]";
}

ffi::Error Invalid(const std::string& text) { return ffi::Error::InvalidArgument("jax_marlin_moe: " + text); }

// What the driver refused: memory may be there another time, the rest is the program's fault.
ffi::Error Refused(const Driver& driver, Result result, const std::string& text) {
  const std::string message = "jax_marlin_moe: " + text + ": " + Describe(driver, result);
  return result == kOutOfMemory ? ffi::Error(ffi::ErrorCode::kResourceExhausted, message)
                                : ffi::Error::InvalidArgument(message);
}

// Symbols separated by single spaces.
std::vector<std::string> Split(std::string_view names) {
  std::vector<std::string> found;
  for (size_t begin = 0; begin <= names.size();) {
    const size_t end = std::min(names.find(' ', begin), names.size());
    found.emplace_back(names.substr(begin, end - begin));
    begin = end + 1;
  }
  return found;
}

bool IsSymbol(const std::string& name) {
  return !name.empty() && name.size() <= 128 && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  });
}

// How many parameters the kernel takes, all of them pointers; -1 where the driver cannot tell (before CUDA 12.4) and
// -2 where one is something else.
int CountPointers(const Driver& driver, Function function) {
  if (driver.FuncGetParamInfo == nullptr) return -1;
  size_t offset = 0, size = 0;
  int count = 0;
  for (; driver.FuncGetParamInfo(function, static_cast<size_t>(count), &offset, &size) == 0; ++count) {
    if (size != sizeof(void*) || offset != count * sizeof(void*)) return -2;
  }
  return count;
}

}  // namespace

bool ProgramAttributes::MatchFingerprint() const {
  Fingerprint actual;
  actual.Add(image.begin(), image.size());
  actual.Add(contract.begin(), contract.size() * sizeof(int64_t));
  actual.Add(kernels.data(), kernels.size());
  return static_cast<int64_t>(actual.value()) == fingerprint;
}

ffi::Error Program::Read(const Driver& driver, const ProgramAttributes& attributes) {
  int device = 0, multiprocessors = 0, most_shared_bytes = 0;
  Result result = driver.CtxGetDevice(&device);
  if (result == 0) result = driver.DeviceGetAttribute(&multiprocessors, kDeviceMultiprocessorCount, device);
  if (result == 0) result = driver.DeviceGetAttribute(&most_shared_bytes, kDeviceMaxSharedBytesPerBlock, device);
  if (result != 0) return ffi::Error::Internal("jax_marlin_moe: " + Describe(driver, result));

  if (!ReadContract(attributes.contract, multiprocessors)) {
    return Invalid("the program's contract is malformed or of another version; lower it again");
  }
  const std::vector<std::string> names = Split(attributes.kernels);
  if (names.size() != kernels_.size() || !std::all_of(names.begin(), names.end(), IsSymbol)) {
    return Invalid("kernels is '" + std::string(attributes.kernels.substr(0, 256)) + "'; it must be " +
                   std::to_string(kernels_.size()) + " symbols separated by spaces; lower the program again");
  }
  for (size_t k = 0; k < kernels_.size(); ++k) {
    Kernel& kernel = kernels_[k];
    kernel.name = names[k];
    if (kernel.blocks == 0) {
      return Invalid("kernel " + kernel.name + " has fewer blocks on this device than a cluster, " +
                     std::to_string(kernel.cluster));
    }
    if (kernel.shared_bytes > static_cast<unsigned>(most_shared_bytes)) {
      return Invalid("kernel " + kernel.name + " asks for " + std::to_string(kernel.shared_bytes) +
                     " bytes of shared memory, a block of this device has at most " +
                     std::to_string(most_shared_bytes));
    }
  }
  return ffi::Error::Success();
}

bool Program::ReadContract(ffi::Span<const int64_t> contract, int multiprocessors) {
  Reader reader(contract);
  const int64_t version = reader.Next(kOldestContractVersion, kContractVersion);
  const int64_t num_buffers = reader.Next(1, kMaxBuffers);
  const int64_t num_kernels = reader.Next(1, kMaxKernels);
  bool counts_tokens = false;
  for (int64_t b = 0; b < num_buffers; ++b) {
    BufferShape shape{reader.Next(0, 255), 0, {}};
    const int64_t rank = reader.Next(0, kMaxRank);
    if (version >= kFirstCountingVersion) shape.rows_of_token = reader.Next(0, rank > 0 ? kMaxExtent : 0);
    counts_tokens = counts_tokens || shape.rows_of_token > 0;
    for (int64_t i = 0; i < rank; ++i) shape.extents.push_back(reader.Next(0, kMaxExtent));
    buffers_.push_back(std::move(shape));
  }
  for (int64_t k = 0; k < num_kernels; ++k) {
    Kernel kernel{};
    kernel.threads = static_cast<unsigned>(reader.Next(1, 1024));
    kernel.shared_bytes = static_cast<unsigned>(reader.Next(0, 1 << 20));
    const int64_t most_blocks = reader.Next(1, INT32_MAX);
    const int64_t blocks_per_multiprocessor = reader.Next(0, 64);
    const int64_t cluster = reader.Next(1, 8);
    const int64_t blocks =
        blocks_per_multiprocessor ? std::min(most_blocks, blocks_per_multiprocessor * multiprocessors) : most_blocks;
    kernel.cluster = static_cast<unsigned>(cluster);
    kernel.blocks = static_cast<unsigned>(blocks - blocks % cluster);
    kernel.overlaps_predecessor = reader.Next(0, 1) == 1;
    const int64_t parameters = reader.Next(1, kMaxBuffers);
    for (int64_t p = 0; p < parameters; ++p) {
      const int64_t buffer = reader.Next(0, counts_tokens ? num_buffers : num_buffers - 1);
      const bool has_offset = version > kOldestContractVersion;
      const bool moves = buffer < num_buffers && buffers_[buffer].rows_of_token == 0;
      const int64_t offset = has_offset ? reader.Next(0, moves ? LastByte(buffers_[buffer]) : 0) : 0;
      kernel.parameters.push_back({static_cast<int>(buffer), offset});
    }
    kernels_.push_back(std::move(kernel));
  }
  return reader.complete();
}

ffi::Error Program::Bind(const Driver& driver, Kernel& kernel) const {
  const std::string name = "kernel " + kernel.name;
  int threads = 0, cluster = 0;
  Result result = driver.ModuleGetFunction(&kernel.function, module_.get(), kernel.name.c_str());
  if (result == 0) result = driver.FuncGetAttribute(&threads, kFunctionMaxThreadsPerBlock, kernel.function);
  if (result != 0) return Refused(driver, result, name);
  // Barriers count the threads that the kernel was compiled for: fewer would wait for ever, or leave rows unwritten.
  if (static_cast<unsigned>(threads) != kernel.threads) {
    return Invalid(name + " was compiled for " + std::to_string(threads) + " threads, the contract asks for " +
                   std::to_string(kernel.threads));
  }
  // Drivers that have no clusters refuse the question.
  if (driver.FuncGetAttribute(&cluster, kFunctionRequiredClusterWidth, kernel.function) != 0) cluster = 0;
  if (static_cast<unsigned>(std::max(cluster, 1)) != kernel.cluster) {
    return Invalid(name + " was compiled for clusters of " + std::to_string(std::max(cluster, 1)) +
                   " blocks, the contract asks for " + std::to_string(kernel.cluster));
  }
  const int pointers = CountPointers(driver, kernel.function);
  if (pointers == -2) return Invalid(name + " has a parameter that is not a pointer");
  if (pointers >= 0 && static_cast<size_t>(pointers) != kernel.parameters.size()) {
    return Invalid(name + " has " + std::to_string(pointers) + " parameters, the contract lists " +
                   std::to_string(kernel.parameters.size()));
  }
  result =
      driver.FuncSetAttribute(kernel.function, kFunctionMaxDynamicSharedBytes, static_cast<int>(kernel.shared_bytes));
  // Left to itself the driver may give shared memory too little for the CTAs that the plan keeps resident, and a
  // change of the split between two kernels keeps them from overlapping: all kernels ask for the most.
  if (result == 0) result = driver.FuncSetAttribute(kernel.function, kFunctionPreferredSharedCarveout, 100);
  return result == 0 ? ffi::Error::Success() : Refused(driver, result, name);
}

ffi::ErrorOr<std::unique_ptr<Program>> Program::Load(const Driver& driver, const ProgramAttributes& attributes) {
  auto program = std::make_unique<Program>(driver);
  if (ffi::Error error = program->Read(driver, attributes); error.failure()) return ffi::Unexpected(error);
  const std::string fault = ImageFault(attributes.image.begin(), attributes.image.size());
  if (!fault.empty()) {
    return ffi::Unexpected(Invalid("the kernels cannot be loaded on this device, the image is damaged: " + fault +
                                   "; lower the program again"));
  }
  const Result result = program->module_.Load(attributes.image.begin());
  if (result != 0) {
    return ffi::Unexpected(
        Refused(driver, result, "the kernels cannot be loaded on this device (compiled for another architecture?)"));
  }
  for (Kernel& kernel : program->kernels_) {
    if (ffi::Error error = program->Bind(driver, kernel); error.failure()) return ffi::Unexpected(error);
  }
  return program;
}

ffi::Error Program::Check(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) const {
  if (args.size() + rets.size() != buffers_.size()) {
    return Invalid("the call has " + std::to_string(args.size() + rets.size()) +
                   " buffers, its kernels were compiled for " + std::to_string(buffers_.size()));
  }
  const int64_t tokens = CountTokens(args, rets);
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const ffi::AnyBuffer buffer = BufferAt(i, args, rets);
    const auto dims = buffer.dimensions();
    const BufferShape& expected = buffers_[i];
    const bool counted = expected.rows_of_token > 0;
    const bool equal = static_cast<int64_t>(buffer.element_type()) == expected.dtype &&
                       dims.size() == expected.extents.size() &&
                       std::equal(dims.begin() + counted, dims.end(), expected.extents.begin() + counted);
    const bool fits =
        equal && (!counted || (dims[0] <= expected.extents[0] && dims[0] == tokens * expected.rows_of_token));
    if (!fits) {
      const std::string rows = counted ? " at most, " + std::to_string(expected.rows_of_token) +
                                             " rows for each of the call's " + std::to_string(tokens) + " tokens"
                                       : "";
      return Invalid("buffer " + std::to_string(i) + " is " +
                     Describe(static_cast<int64_t>(buffer.element_type()), dims.begin(), dims.size()) +
                     ", its kernels were compiled for " +
                     Describe(expected.dtype, expected.extents.data(), expected.extents.size()) + rows);
    }
  }
  return ffi::Error::Success();
}

int64_t Program::CountTokens(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) const {
  for (size_t i = 0; i < buffers_.size(); ++i) {
    if (buffers_[i].rows_of_token == 0) continue;
    const auto dims = BufferAt(i, args, rets).dimensions();
    return dims.size() == 0 ? 0 : dims[0] / buffers_[i].rows_of_token;
  }
  return 0;
}

ffi::Error Program::Launch(const Driver& driver, Stream stream, const ffi::RemainingArgs& args,
                           const ffi::RemainingRets& rets) const {
  void* pointers[kMaxBuffers];
  for (size_t i = 0; i < buffers_.size(); ++i) pointers[i] = BufferAt(i, args, rets).untyped_data();
  int64_t tokens = CountTokens(args, rets);
  // A driver that cannot count a kernel's parameters may read more of them than the contract lists: they are null.
  static void* absent = nullptr;
  void* addresses[kMaxBuffers];
  void* parameters[kMaxUncountedParameters];
  const size_t uncounted = driver.FuncGetParamInfo == nullptr ? kMaxUncountedParameters : 0;
  for (const Kernel& kernel : kernels_) {
    for (size_t p = 0; p < kernel.parameters.size(); ++p) {
      const Parameter& parameter = kernel.parameters[p];
      const size_t buffer = parameter.buffer;
      addresses[p] = buffer < buffers_.size() ? static_cast<char*>(pointers[buffer]) + parameter.offset : nullptr;
      parameters[p] = buffer < buffers_.size() ? static_cast<void*>(&addresses[p]) : &tokens;
    }
    for (size_t p = kernel.parameters.size(); p < uncounted; ++p) parameters[p] = &absent;
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
    if (result != 0) {
      return ffi::Error::Internal("jax_marlin_moe: launch of " + kernel.name + " failed: " + Describe(driver, result));
    }
  }
  return ffi::Error::Success();
}

}  // namespace jax_marlin_moe::cuda
