// Programs by hand, each with what must become of it.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda_program_call.h"

namespace cuda_program_fuzz {

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

}  // namespace cuda_program_fuzz
