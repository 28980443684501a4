// The handlers of CUDA programs on fake_libcuda: what must be refused, what must run, and that nothing leaks.
//   cuda_program_fuzz CALLS SEED    the cases by hand, then random and mutated programs
//   cuda_program_fuzz image FILE    a real image is accepted whole, and refused when it is cut anywhere
//   cuda_program_fuzz time CALLS    nanoseconds of the initialize handler for a known program
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ffi/cuda_handlers.h"
#include "ffi/cuda_image.h"
#include "ffi/fingerprint.h"
#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

namespace {

using Rng = std::mt19937_64;

XLA_FFI_Error* Create(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->errc, args->message}; }
void Destroy(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = reinterpret_cast<void*>(0x20);
  return nullptr;
}

void Require(bool holds, const std::string& what) {
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

Call MakeCall(const std::string& tag, const std::vector<std::vector<int64_t>>& shapes,
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

Call OneKernel(const std::string& tag, const std::function<void(Launched&)>& change = [](Launched&) {}) {
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

std::string Run(const Call& call) { return Executable(call).Run(); }

class Cases {
 public:
  explicit Cases(const Notes& notes) : notes_(notes) {}

  void Runs(const std::string& what, const Executable& executable, const std::string& tag) const {
    const std::string text = executable.Run();
    Require(text.empty(), what + ": " + text);
    Require(tag == notes_.last_tag, what + ": ran " + notes_.last_tag + ", not " + tag);
  }
  void Runs(const std::string& what, const Call& call) const { Runs(what, Executable(call), call.tag); }

  void Refused(const std::string& what, const Call& call, const std::string& message) const {
    const long live = *notes_.live_modules, launches = *notes_.launches;
    const std::string text = Run(call);
    Require(text.find(message) != std::string::npos, what + ": found '" + text + "', not '" + message + "'");
    Require(*notes_.live_modules == live, what + ": a module leaked");
    Require(*notes_.launches == launches, what + ": something was launched");
  }

  void All() const {
    Identity();
    Addresses();
    Launches();
    Counts();
    Failures();
    Require(*notes_.wild_pointers == 0, "a parameter's pointer was null or wild");
    Require(*notes_.bad_launches == 0, "a launch was not what the kernel was compiled for");
  }

 private:
  void Identity() const {
    const Call first = OneKernel("first");
    Runs("a good program", first);
    const long loads = *notes_.loads;
    Runs("the same at another address", first);
    Require(*notes_.loads == loads, "a program is loaded once");

    Call other = OneKernel("other");
    other.fingerprint = first.fingerprint;
    Refused("the fingerprint of a loaded program", other, "do not match their fingerprint");
    Call unsigned_program = OneKernel("unsigned");
    unsigned_program.fingerprint ^= 1;
    Refused("a fingerprint of nothing", unsigned_program, "do not match their fingerprint");
    // The digest runs over all bytes in a row: shifting the boundaries between them keeps it.
    Call shifted = first;
    shifted.image.append(reinterpret_cast<const char*>(first.contract.data()), 8);
    shifted.contract.erase(shifted.contract.begin());
    Refused("an equal fingerprint of other bytes", shifted, "another program with the fingerprint");

    *notes_.context = reinterpret_cast<void*>(0x2000);
    Runs("in another context", first);
    Require(*notes_.loads == loads + 1, "a program is loaded once for each context");
    *notes_.context = nullptr;
    Refused("without a context", first, "no current CUDA context");
    *notes_.context = reinterpret_cast<void*>(0x1000);
  }

  void Addresses() const {
    const Call a = OneKernel("addr_a"), b = OneKernel("addr_b");
    Executable executable(a);
    Runs("at an address", executable, "addr_a");
    executable.Overwrite(b);
    Runs("another program at the same address", executable, "addr_b");
    executable.Overwrite(a);
    Runs("and the first one again", executable, "addr_a");
    Call changed = a;
    changed.contract[3 + 4] += 1;
    executable.Overwrite(changed);
    Require(executable.Run().find("do not match their fingerprint") != std::string::npos,
            "a contract changed in place");
    Call damaged = a;
    damaged.image[2] ^= 1;
    executable.Overwrite(damaged);
    Require(executable.Run().find("do not match their fingerprint") != std::string::npos, "an image changed in place");

    // Damage that a glance at a known address does not see is harmless: what runs is the original. Anywhere else the
    // copy is refused.
    Call large = OneKernel("large");
    large.image.insert(large.image.size() - 1, std::string(4096, ' '));
    large.Sign();
    Executable known(large);
    Runs("a large image", known, "large");
    Call middle = large;
    middle.image[middle.image.size() / 2] = 'x';
    known.Overwrite(middle);
    Runs("a damaged copy in the original's place", known, "large");
    Refused("a damaged copy", middle, "do not match their fingerprint");
  }

  void Launches() const {
    using Change = std::function<void(Launched&)>;
    const std::vector<std::tuple<const char*, Change, const char*>> refused = {
        {"more threads", [](Launched& k) { k.threads = 128; },
         "was compiled for 64 threads, the contract asks for 128"},
        {"fewer threads", [](Launched& k) { k.threads = 32; }, "was compiled for 64 threads, the contract asks for 32"},
        {"a cluster it was not compiled for", [](Launched& k) { k.cluster = 2; },
         "was compiled for clusters of 1 blocks, the contract asks for 2"},
        {"no cluster where it was", [](Launched& k) { k.compiled_cluster = 4; },
         "was compiled for clusters of 4 blocks, the contract asks for 1"},
        {"fewer blocks than a cluster", [](Launched& k) { k.cluster = k.compiled_cluster = 8; },
         "has fewer blocks on this device than a cluster, 8"},
        {"no blocks", [](Launched& k) { k.most_blocks = 0; }, "contract is malformed"},
        {"more shared memory than a block has", [](Launched& k) { k.shared_bytes = 232449; },
         "asks for 232449 bytes of shared memory, a block of this device has at most 232448"},
        {"a buffer past the last", [](Launched& k) { k.parameters = {2}; }, "contract is malformed"},
        {"a byte past the buffer", [](Launched& k) { k.offset = 24; }, "contract is malformed"},
        {"a byte before the buffer", [](Launched& k) { k.offset = -1; }, "contract is malformed"},
    };
    for (const auto& [what, change, message] : refused) Refused(what, OneKernel("launch", change), message);
    Runs("clusters", OneKernel("clusters", [](Launched& k) { k.cluster = k.compiled_cluster = 4; }));
    Runs("a bounded grid", OneKernel("bounded", [](Launched& k) {
           k.most_blocks = 100000;
           k.blocks_per_multiprocessor = 3;
           k.cluster = k.compiled_cluster = 8;
         }));
    Runs("the last byte of a buffer", OneKernel("offset", [](Launched& k) { k.offset = 23; }));
    Runs("a contract without offsets", MakeCall("old", {{2, 3}, {5}}, {Launched{}}, 3));
    Runs("all shared memory", OneKernel("shared", [](Launched& k) { k.shared_bytes = 232448; }));

    const Call fewer = OneKernel("fewer", [](Launched& k) { k.compiled_parameters = 3; });
    if (notes_.counts_parameters) {
      Refused("fewer parameters than the kernel has", fewer, "has 3 parameters, the contract lists 1");
      Refused("more parameters than the kernel has", OneKernel("more", [](Launched& k) { k.parameters = {0, 1}; }),
              "has 1 parameters, the contract lists 2");
    } else {
      Runs("parameters that nobody counts are null", fewer);
    }
    for (const char* kernels : {"", " jmm_stage0", "jmm_stage0 ", "jmm_stage0 jmm_stage0", "jmm-stage0", "a\nb"}) {
      Call call = OneKernel("names");
      call.kernels = kernels;
      call.Sign();
      Refused(std::string("kernels ") + kernels, call, "it must be 1 symbols separated by spaces");
    }
    Call absent = OneKernel("absent");
    absent.kernels = "jmm_absent";
    absent.Sign();
    Refused("a symbol that is not there", absent, "kernel jmm_absent: CUDA error 500");
  }

  // A row for each token, and three of a vector: eight tokens at most. The kernel takes the first buffer and the
  // number.
  static Call Counting(
      const std::vector<std::vector<int64_t>>& shapes, const std::function<void(Launched&)>& change = [](Launched&) {},
      const std::vector<int64_t>& rows_of_token = {1, 3}) {
    Launched kernel;
    kernel.parameters = {0, 2};
    kernel.compiled_parameters = 2;
    change(kernel);
    Call call = MakeCall("counting", {{8, 3}, {24}}, {kernel}, 5, rows_of_token);
    call.shapes = shapes;
    return call;
  }

  void Counts() const {
    Runs("the most tokens", Counting({{8, 3}, {24}}));
    Runs("fewer tokens", Counting({{5, 3}, {15}}));
    Runs("no tokens", Counting({{0, 3}, {0}}));
    Refused("more tokens", Counting({{9, 3}, {27}}), "[8, 3] at most, 1 rows for each of the call's 9 tokens");
    for (const int64_t rows : {0, 12, 14, 16, 24}) {
      Refused("rows of another number of tokens", Counting({{5, 3}, {rows}}),
              "[24] at most, 3 rows for each of the call's 5 tokens");
    }
    Refused("other columns", Counting({{5, 4}, {15}}), "buffer 0 is dtype code 11 [5, 4]");
    Refused("another rank", Counting({{}, {15}}), "buffer 0 is dtype code 11 []");
    Refused("a byte of the number of tokens",
            Counting({{8, 3}, {24}}, [](Launched& k) { k.parameters = {2, 0}, k.offset = 1; }),
            "contract is malformed");
    Refused("a byte of counted rows",
            Counting({{8, 3}, {24}}, [](Launched& k) { k.parameters = {0, 0}, k.offset = 4; }),
            "contract is malformed");
    Refused("a number of tokens of a call that counts none", Counting({{8, 3}, {24}}, [](Launched&) {}, {0, 0}),
            "contract is malformed");
    Refused("a parameter past the number of tokens",
            Counting({{8, 3}, {24}}, [](Launched& k) { k.parameters = {0, 3}; }), "contract is malformed");
    Refused("a negative number of rows", Counting({{8, 3}, {24}}, [](Launched&) {}, {-1, 3}), "contract is malformed");
    Refused("rows of a scalar", MakeCall("scalar", {{}, {5}}, {Launched{}}, 5, {1, 0}), "contract is malformed");
    Runs("a contract that could count", MakeCall("exact", {{2, 3}, {5}}, {Launched{}}, 5));
  }

  void Failures() const {
    for (const char* image : {"", "x", "FAKE", "no NUL", "\x7f",
                              "\x7f"
                              "ELF",
                              "\1\2\3\4"}) {
      Call call = OneKernel("image");
      call.image = image;
      call.Sign();
      const long loads = *notes_.loads;
      Refused(std::string("image '") + image + "'", call, "cannot be loaded on this device");
      Require(*notes_.loads == loads, "an unbounded image reached the driver");
    }
    const Call bad = OneKernel("bad", [](Launched& k) { k.threads = 96; });
    const long loads = *notes_.loads;
    for (int i = 0; i < 1000; ++i) Refused("again and again", bad, "was compiled for 64 threads");
    Require(*notes_.loads == loads + 1, "a failure is remembered");
    const Call later = OneKernel("later");
    *notes_.memory_is_short = 1;
    for (int i = 0; i < 3; ++i) Refused("without memory", later, "8 jax_marlin_moe");  // RESOURCE_EXHAUSTED
    *notes_.memory_is_short = 0;
    Runs("with memory again", later);
  }

  const Notes& notes_;
};

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

int main(int argc, char** argv) {
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
