// PTX by which warps, CTAs of a cluster and kernels wait for each other, one function per instruction.
#pragma once

#include "types.cuh"

namespace jmm {

// Named barrier `kId` of the CTA, for `threads` of its threads. An identifier that is not a constant would reserve all
// 16 barriers of a CTA, and a multiprocessor has 64.
template <int kId>
__device__ __forceinline__ void named_barrier_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}

// A barrier for all threads of a cluster of CTAs (sm_90 and up).
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Programmatic dependent launch: blocks until the kernels before this one in the stream have ended and their writes
// are visible. A no-op where the kernel was launched without the attribute.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start as soon as every CTA of this one has come here or ended.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace jmm
