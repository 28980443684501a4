// Subnormal float32 numbers for the time of a call's work on a thread.
//
// XLA runs its threads with subnormals flushed to zero. An e8m0 scale of 2^-127 is one, and small floating-point codes
// are on the way to their value.
#ifndef JAX_MARLIN_MOE_CPU_FLOAT_MODE_H_
#define JAX_MARLIN_MOE_CPU_FLOAT_MODE_H_

#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace jax_marlin_moe::cpu {

// Keeps subnormals until it is destroyed, on this thread.
class KeepSubnormals {
 public:
#if defined(__x86_64__)
  KeepSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~kFlush); }
  ~KeepSubnormals() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  KeepSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ & ~kFlush));
  }
  ~KeepSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }
#else
  KeepSubnormals() {}
#endif
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint32_t kFlush = 1u << 15 | 1u << 6;  // of results (FTZ), of operands (DAZ)
  uint32_t before_;
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FZ
  uint64_t before_;
#endif
};

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_FLOAT_MODE_H_
