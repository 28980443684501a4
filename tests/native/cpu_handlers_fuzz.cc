// Calls the CPU handlers as XLA would, with operands that are right, slightly wrong, or absurd.
//
//   cpu_handlers_fuzz SECONDS CALLS CALLERS FIRST_SEED
//
// Ends after SECONDS or CALLS handler calls, whichever comes first. A case is a pure function of its seed: valid
// operands of one op, random data, and up to three changes of structure. A call that is accepted is repeated into
// results that held other bytes before: both must end with the same bytes, so results are written whole and do not
// depend on timing. Memory errors, undefined behaviour and races are for the sanitizers to report; exit status 1 says
// that results differed, or that no case of some op was accepted, which would make all of this vacuous.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu_handler_call.h"
#include "cpu_handler_case.h"
#include "cpu_handler_changes.h"
#include "cpu_handler_draws.h"

namespace jax_marlin_moe::fuzz {
namespace {

struct Tally {
  std::atomic<int64_t> calls{0}, skipped{0}, unequal{0};
  std::atomic<int64_t> accepted[kOpCount] = {};
};

void RunCase(uint64_t seed, const XLA_FFI_Api& api, Pool& pool, Tally& tally) {
  Random random(seed);
  Case call;
  call.op = static_cast<int>(random.Below(kOpCount));
  kOps[call.op].draw(random, call);
  for (int64_t changes = random.OneIn(3) ? 0 : 1 + random.Below(3); changes > 0; --changes) Change(random, call);
  for (const std::vector<Tensor>* tensors : {&call.operands, &call.results}) {
    for (const Tensor& tensor : *tensors) {
      if (Bytes(tensor) < 0) {
        ++tally.skipped;
        return;
      }
    }
  }
  std::vector<Memory> operands, results, again;
  for (const Tensor& tensor : call.operands) {
    operands.emplace_back(tensor, static_cast<unsigned char>(0));
    Fill(random, tensor.content, operands.back());
  }
  for (const Tensor& tensor : call.results) {
    results.emplace_back(tensor, static_cast<unsigned char>(0xCD));
    again.emplace_back(tensor, static_cast<unsigned char>(0x3A));
  }
  ++tally.calls;
  if (!Call(api, pool, call, operands, results).empty()) return;
  ++tally.accepted[call.op];
  ++tally.calls;
  bool equal = Call(api, pool, call, operands, again).empty();
  for (size_t i = 0; i < results.size(); ++i) {
    equal = equal && std::memcmp(results[i].data.get(), again[i].data.get(), results[i].bytes) == 0;
  }
  if (equal) return;
  ++tally.unequal;
  std::printf("seed %llu: two calls of %s with the same operands differ\n", static_cast<unsigned long long>(seed),
              kOps[call.op].name);
}

int Main(double seconds, int64_t most_calls, int callers, uint64_t first_seed) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const XLA_FFI_Api api = MakeApi();
  Tally tally;
  {
    Pool pool(2);
    std::atomic<uint64_t> seed{first_seed};
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i) {
      threads.emplace_back([&] {
        while (tally.calls < most_calls && std::chrono::steady_clock::now() < end) {
          RunCase(seed++, api, pool, tally);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  std::printf(
      "%lld calls, %lld results unequal, %lld cases passed over; accepted:", static_cast<long long>(tally.calls),
      static_cast<long long>(tally.unequal), static_cast<long long>(tally.skipped));
  bool vacuous = false;
  for (int op = 0; op < kOpCount; ++op) {
    std::printf(" %s %lld", kOps[op].name, static_cast<long long>(tally.accepted[op]));
    vacuous = vacuous || tally.accepted[op] == 0;
  }
  std::printf("\n");
  return tally.unequal > 0 || vacuous ? 1 : 0;
}

}  // namespace
}  // namespace jax_marlin_moe::fuzz

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s SECONDS CALLS CALLERS FIRST_SEED\n", argv[0]);
    return 2;
  }
  return jax_marlin_moe::fuzz::Main(std::atof(argv[1]), std::atoll(argv[2]), std::atoi(argv[3]),
                                    std::strtoull(argv[4], nullptr, 10));
}
