// Runs the phases of one call on the threads that its caller lends.
//
// The calling thread works too and waits only for items that some thread has begun. So a call finishes when
// the pool never gives it a thread, and it cannot deadlock when it runs on a pool thread itself.
#ifndef JAX_MARLIN_MOE_CPU_PHASES_H_
#define JAX_MARLIN_MOE_CPU_PHASES_H_

#include <cstdint>
#include <functional>
#include <vector>

namespace jax_marlin_moe::cpu {

// A thread pool, whoever owns it.
class Workers {
 public:
  virtual ~Workers() = default;

  // Threads that may work on one call, the calling one included: at least 1.
  virtual int64_t count() const = 0;

  // Runs `task` on one of the pool's threads some time, or never.
  virtual void Schedule(std::function<void()> task) = 0;
};

struct Phase {
  int64_t items;
  std::function<void(int64_t item)> run;  // must not throw; items of a phase run in any order, at once, with subnormals
};

// A phase begins when every item of the one before has ended, and sees all that it wrote.
void RunPhases(Workers& workers, std::vector<Phase> phases);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_PHASES_H_
