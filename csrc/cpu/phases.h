// Runs the phases of one call on XLA's intra-op thread pool.
//
// The calling thread works too and waits only for items that some thread has begun. So a call finishes when
// the pool never gives it a thread, and it cannot deadlock when it runs on a pool thread itself.
#ifndef JAX_MARLIN_MOE_CPU_PHASES_H_
#define JAX_MARLIN_MOE_CPU_PHASES_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_marlin_moe::cpu {

struct Phase {
  int64_t items;
  std::function<void(int64_t item)> run;  // must not throw; items of a phase run in any order, at once, with subnormals
};

// Threads that may work on one call.
int64_t TeamSize(const xla::ffi::ThreadPool& pool);

// A phase begins when every item of the one before has ended, and sees all that it wrote.
void RunPhases(xla::ffi::ThreadPool& pool, std::vector<Phase> phases);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_PHASES_H_
