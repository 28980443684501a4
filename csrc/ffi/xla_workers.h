// XLA's intra-op thread pool as the workers of a call.
#ifndef JAX_MARLIN_MOE_FFI_XLA_WORKERS_H_
#define JAX_MARLIN_MOE_FFI_XLA_WORKERS_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

#include "cpu/phases.h"
#include "xla/ffi/api/ffi.h"

namespace jax_marlin_moe {

class XlaWorkers final : public cpu::Workers {
 public:
  explicit XlaWorkers(xla::ffi::ThreadPool& pool) : pool_(pool) {}

  int64_t count() const override { return std::max<int64_t>(1, pool_.num_threads()); }
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  xla::ffi::ThreadPool& pool_;
};

}  // namespace jax_marlin_moe

#endif  // JAX_MARLIN_MOE_FFI_XLA_WORKERS_H_
