// PTX of loads, stores and prefetches, one function per instruction, and addresses in shared memory.
#pragma once

#include "types.cuh"

namespace jmm {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four words of shared memory.
__device__ __forceinline__ uint4 load_shared16(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared));
  return v;
}

__device__ __forceinline__ uint2 load_shared8(uint32_t shared) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared));
  return v;
}

__device__ __forceinline__ uint32_t load_shared4(uint32_t shared) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared));
  return v;
}

__device__ __forceinline__ uint32_t load_shared2(uint32_t shared) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(shared));
  return v;
}

// kWords words of shared memory, aligned to their size.
template <int kWords>
__device__ __forceinline__ void load_shared_words(uint32_t (&w)[kWords], uint32_t shared) {
  static_assert(kWords == 1 || kWords == 2 || kWords % 4 == 0, "one load each");
  if constexpr (kWords == 1) {
    w[0] = load_shared4(shared);
  } else if constexpr (kWords == 2) {
    const uint2 v = load_shared8(shared);
    w[0] = v.x, w[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 v = load_shared16(shared + 4 * i);
      w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
    }
  }
}

// Words of global memory, aligned to their size, at most 16 bytes a store.
template <int kWords>
__device__ __forceinline__ void store_words(uint32_t* place, const uint32_t (&w)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords % 4 == 0, "whole stores");
  if constexpr (kWords == 1) {
    *place = w[0];
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(place) = uint2{w[0], w[1]};
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      *reinterpret_cast<uint4*>(place + i) = uint4{w[i], w[i + 1], w[i + 2], w[i + 3]};
    }
  }
}

__device__ __forceinline__ float4 as_floats(uint4 v) {
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// Where CTA `cta` of the cluster (sm_90 and up) has what this one has at `shared`.
__device__ __forceinline__ uint32_t shared_of_cta(uint32_t shared, int cta) {
  uint32_t theirs = shared;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared), "r"(cta));
#endif
  return theirs;
}

// Four numbers of the shared memory of any CTA of the cluster.
__device__ __forceinline__ float4 load_cluster16(uint32_t theirs) {
  float4 v{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(theirs));
#endif
  return v;
}

// Asks for a line of memory, without waiting for it.
__device__ __forceinline__ void fetch_to_l2(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

// 16 bytes of memory that another kernel of this call writes again and again: past L1, and not before earlier waits.
__device__ __forceinline__ uint4 load_from_l2(const uint4* source) {
  uint4 words;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(source)
               : "memory");
  return words;
}

}  // namespace jmm
