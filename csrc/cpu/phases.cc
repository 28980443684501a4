// One team of threads goes through all phases: waking pool threads again for each would cost more than a
// phase of a single token's work.
#include "cpu/phases.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>
#include <utility>

#include "cpu/float_mode.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kSpins = 4096;  // tens of microseconds, about one item, before a waiting thread yields

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct alignas(64) Progress {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

// Shared with threads that may arrive after the call has returned. Those find no item left, so they never
// touch what the phases refer to.
struct Team {
  explicit Team(std::vector<Phase> work) : phases(std::move(work)), progress(phases.size()) {}

  void Work() {
    const KeepSubnormals keep;
    for (size_t p = 0; p < phases.size(); ++p) {
      const int64_t items = phases[p].items;
      int64_t mine = 0;
      for (int64_t item; (item = progress[p].next.fetch_add(1, std::memory_order_relaxed)) < items; ++mine) {
        phases[p].run(item);
      }
      if (mine > 0) progress[p].done.fetch_add(mine, std::memory_order_release);
      for (int spin = 0; progress[p].done.load(std::memory_order_acquire) < items; ++spin) {
        if (spin < kSpins) {
          Pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

  const std::vector<Phase> phases;
  std::vector<Progress> progress;
};

}  // namespace

void RunPhases(Workers& workers, std::vector<Phase> phases) {
  int64_t widest = 0;
  for (const Phase& phase : phases) widest = std::max(widest, phase.items);
  if (widest == 0) return;
  auto team = std::make_shared<Team>(std::move(phases));
  const int64_t others = std::min(workers.count(), widest) - 1;
  try {
    for (int64_t i = 0; i < others; ++i) workers.Schedule([team] { team->Work(); });
  } catch (const std::bad_alloc&) {
    // Those scheduled so far already work, so the call goes on with them: leaving now would pull its memory from them.
  }
  team->Work();
}

}  // namespace jax_marlin_moe::cpu
