// The handlers of CUDA programs on fake_libcuda: what must be refused, what must run, and that nothing leaks.
//   cuda_program_fuzz CALLS SEED    the cases by hand, then random and mutated programs
//   cuda_program_fuzz image FILE    a real image is accepted whole, and refused when it is cut anywhere
//   cuda_program_fuzz time CALLS    nanoseconds of the initialize handler for a known program
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_program_call.h"
#include "cuda_program_cases.h"
#include "ffi/cuda_handlers.h"
#include "ffi/cuda_image.h"

namespace cuda_program_fuzz {
namespace {

using Rng = std::mt19937_64;

Call RandomCall(Rng& rng) {
  std::vector<std::vector<int64_t>> shapes(1 + rng() % 6);
  for (auto& shape : shapes) {
    for (size_t rank = rng() % 4; rank > 0; --rank) shape.push_back(static_cast<int64_t>(rng() % 4));
  }
  std::vector<Launched> kernels(1 + rng() % 3);
  for (Launched& kernel : kernels) {
    kernel.threads = kernel.compiled_threads = 32 * static_cast<int64_t>(1 + rng() % 32);
    kernel.shared_bytes = static_cast<int64_t>(rng() % 200000);
    kernel.cluster = kernel.compiled_cluster = static_cast<int64_t>(1 + rng() % 4);
    kernel.most_blocks = kernel.cluster + static_cast<int64_t>(rng() % 500);
    kernel.blocks_per_multiprocessor = static_cast<int64_t>(rng() % 3);
    kernel.overlaps = static_cast<int64_t>(rng() % 2);
    kernel.parameters.assign(1 + rng() % shapes.size(), 0);
    for (int64_t& parameter : kernel.parameters) parameter = static_cast<int64_t>(rng() % shapes.size());
    kernel.compiled_parameters = static_cast<int64_t>(kernel.parameters.size());
  }
  const std::string tag = "t" + std::to_string(rng());
  return MakeCall(tag, shapes, kernels, 4 + static_cast<int64_t>(rng() % 2));
}

void Fuzz(const Notes& notes, long calls, Rng& rng) {
  std::vector<Call> known;
  long accepted = 0;
  for (long n = 0; n < calls; ++n) {
    Call call = RandomCall(rng);
    bool good = false, must_fail = false;
    auto& contract = call.contract;
    switch (rng() % 8) {
      case 0: {
        const int64_t odd[] = {-1, 0, 1, 2, 64, 65, 1 << 20, INT32_MAX, int64_t{1} << 48, INT64_MAX, INT64_MIN};
        contract[rng() % contract.size()] = odd[rng() % std::size(odd)];
        call.Sign();
        break;
      }
      case 1:
        contract.resize(rng() % contract.size());
        call.Sign();
        must_fail = true;
        break;
      case 2:
        contract.push_back(static_cast<int64_t>(rng() % 5));
        call.Sign();
        must_fail = true;
        break;
      case 3:
        call.image.resize(rng() % call.image.size());
        call.Sign();
        must_fail = true;
        break;
      case 4:
        for (int64_t& field : contract) {
          if (rng() % 4 == 0) field = static_cast<int64_t>(rng());
        }
        call.Sign();
        break;
      case 5:
        call.fingerprint = known.empty() ? call.fingerprint ^ 1 : known[rng() % known.size()].fingerprint;
        must_fail = true;
        break;
      case 6: {
        std::string& bytes = rng() % 2 ? call.image : call.kernels;
        bytes[rng() % bytes.size()] ^= static_cast<char>(1 << rng() % 8);
        must_fail = true;  // unsigned
        break;
      }
      default:
        good = true;
    }
    const long live = *notes.live_modules, launches = *notes.launches;
    const std::string text = Run(call);
    if (text.empty()) {
      ++accepted;
      Require(!must_fail, "call " + std::to_string(n) + " ran and must not");
      Require(call.tag == notes.last_tag, "call " + std::to_string(n) + " ran another program");
      if (good && known.size() < 500) known.push_back(call);
    } else {
      Require(!good, "call " + std::to_string(n) + ": " + text);
      Require(*notes.launches == launches, "call " + std::to_string(n) + " failed and launched");
    }
    Require(*notes.live_modules - live <= (text.empty() ? 1 : 0) || text.find("buffer") != std::string::npos,
            "call " + std::to_string(n) + " leaked a module: " + text);
    Require(*notes.wild_pointers == 0, "call " + std::to_string(n) + ": a wild pointer");
    Require(*notes.bad_launches == 0, "call " + std::to_string(n) + ": not launched as compiled");
  }
  for (const Call& call : known) Require(Run(call).empty(), "known programs stay good");
  std::printf("%ld calls, %ld of them ran\n", calls, accepted);
  Require(calls < 100 || accepted > calls / 20, "the fuzz reaches launches");
}

void CheckImage(const char* path, Rng& rng) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<uint8_t> image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Require(!image.empty(), "an image");
  auto fault = [&](size_t size) {
    std::unique_ptr<uint8_t[]> exact(new uint8_t[size]);
    std::memcpy(exact.get(), image.data(), size);
    return jax_marlin_moe::cuda::ImageFault(exact.get(), size);
  };
  Require(fault(image.size()).empty(), "a whole image: " + fault(image.size()));
  for (size_t size = 0; size < image.size(); size += size < 1024 ? 1 : 1 + rng() % 997) {
    Require(!fault(size).empty(), "an image of which " + std::to_string(size) + " bytes are left");
  }
  Require(!fault(image.size() - 1).empty(), "an image without its last byte");
  for (int i = 0; i < 20000; ++i) {  // whatever the headers say, nothing past the end is read
    std::unique_ptr<uint8_t[]> changed(new uint8_t[image.size()]);
    std::memcpy(changed.get(), image.data(), image.size());
    for (int j = 0; j < 4; ++j) changed[rng() % (i % 2 ? 64 : image.size())] = static_cast<uint8_t>(rng());
    jax_marlin_moe::cuda::ImageFault(changed.get(), image.size());
  }
}

void Time(long calls) {
  Launched kernel;
  Call call = MakeCall("timed", {{64, 4096}, {8, 256, 8192}, {8, 32, 8192}, {64, 4096}}, {kernel, kernel, kernel});
  call.image.insert(call.image.size() - 1, std::string(100000, ' '));
  call.Sign();
  Require(Run(call).empty(), "the program that is timed");
  const Executable executable(call);
  auto nanoseconds = [&](XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {  // of processor time
    const std::clock_t begin = std::clock();
    for (long n = 0; n < calls; ++n) executable.Stage(handler, XLA_FFI_ExecutionStage_INITIALIZE);
    return 1e9 * static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC / static_cast<double>(calls);
  };
  const double frame = nanoseconds([](XLA_FFI_CallFrame*) -> XLA_FFI_Error* { return nullptr; });
  const double total = nanoseconds(jax_marlin_moe::CudaInitialize);
  std::printf("%.0f ns to decode the attributes and find the program again\n", total - frame);
}

}  // namespace
}  // namespace cuda_program_fuzz

int main(int argc, char** argv) {
  using namespace cuda_program_fuzz;
  Require(argc == 3, "cuda_program_fuzz CALLS SEED | image FILE | time CALLS");
  const std::string mode = argv[1];
  Rng rng(mode == "image" || mode == "time" ? 0 : std::strtoull(argv[2], nullptr, 10));
  if (mode == "image") {
    CheckImage(argv[2], rng);
    return 0;
  }
  const Notes notes;
  if (mode == "time") {
    Time(std::atol(argv[2]));
    return 0;
  }
  Cases(notes).All();
  Fuzz(notes, std::atol(argv[1]), rng);
  return 0;
}
