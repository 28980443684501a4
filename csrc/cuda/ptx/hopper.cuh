// The PTX instructions that only sm_90a has, or that only its kernels use, one function each, and nothing else.
#pragma once

#include "types.cuh"

namespace jmm {

// Barriers in shared memory (mbarrier): `count` arrivals complete a phase; waits name the phase's parity.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// Zero, as no compiler knows: grids have one dimension.
__device__ __forceinline__ uint32_t opaque_zero() {
  uint32_t zero;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(zero));
  return zero;
}

// `copy16`, or zeros in its place: nothing is read then.
__device__ __forceinline__ void copy16_or_zeros(uint32_t shared, const void* global, bool copies) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(copies ? 16 : 0)
               : "memory");
}

// Arrives as soon as the copies that this thread has started so far are complete.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

// Arrives at named barrier `kId` of the CTA, for `threads` of its threads, without waiting there.
template <int kId>
__device__ __forceinline__ void named_barrier_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}

// The barrier's phase completes after so many bytes more, of copies that name it. One arrival is still to come.
__device__ __forceinline__ void mbarrier_expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// True for one lane of a warp, and the compiler knows that it is one.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected != 0;
}

// One thread's copy of kBytes, a multiple of 16, to shared memory.
template <int kBytes>
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared),
      "l"(global), "n"(kBytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Has L2 fetch these bytes.
template <int kBytes>
__device__ __forceinline__ void fetch_bulk_to_l2(const void* global) {
  static_assert(kBytes % 16 == 0, "whole pieces");
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "n"(kBytes) : "memory");
}

// Makes shared memory that this thread has seen written by ordinary stores and copies visible to wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Moves registers between the warpgroups of a CTA.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Matrix products of a warpgroup. They are asynchronous: registers that they read or write, and shared memory that
// they read, stay untouched until wgmma_wait says so.

// The fragment is complete here: the compiler moves nothing of its making past this point.
__device__ __forceinline__ void wgmma_operand_ready(uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

// Whether `value` is true in any thread of a warpgroup, which meets at this one of the CTA's barriers.
__device__ __forceinline__ bool any_of_warpgroup(int barrier, bool value) {
  uint32_t any;
  asm volatile("{ .reg .pred p, q; setp.ne.b32 p, %1, 0; bar.red.or.pred q, %2, 128, p; selp.b32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"(uint32_t(value)), "r"(barrier)
               : "memory");
  return any;
}

// Orders what this warpgroup's threads did to registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// B as wgmma wants it described: rows of 128 bytes (64 values of K), 16-byte pieces of row r swizzled by r % 8, groups
// of 8 rows (1024 bytes) after each other. Addresses count in sixteens; `offset` bytes of constant cost one addition.
struct WgmmaRows {
  uint32_t low;

  __device__ __forceinline__ explicit WgmmaRows(uint32_t shared) : low(shared / 16 | kUnused) {}
  __device__ __forceinline__ uint64_t at(uint32_t offset) const {
    return uint64_t(kSwizzle128 | kGroupStride) << 32 | (low + offset / 16);
  }

 private:
  static constexpr uint32_t kSwizzle128 = 1u << 30, kGroupStride = 1024 / 16, kUnused = 1u << 16;
};

// d (64 x kN, float32) = a (64 x 16, registers) * b (16 x kN) + (accumulate ? d : 0). Each warp has 16 rows of a and d,
// in the fragments of mma_16x8x16.
template <class T, int kN>
struct Wgmma;

// The operands of kN / 2 sums: their numbers in the instruction's text, and the registers that they stand for.
#define JMM_NUMBERS4 "%0, %1, %2, %3"
#define JMM_NUMBERS8 JMM_NUMBERS4 ", %4, %5, %6, %7"
#define JMM_NUMBERS12 JMM_NUMBERS8 ", %8, %9, %10, %11"
#define JMM_NUMBERS16 JMM_NUMBERS12 ", %12, %13, %14, %15"
#define JMM_NUMBERS20 JMM_NUMBERS16 ", %16, %17, %18, %19"
#define JMM_NUMBERS24 JMM_NUMBERS20 ", %20, %21, %22, %23"
#define JMM_NUMBERS28 JMM_NUMBERS24 ", %24, %25, %26, %27"
#define JMM_NUMBERS32 JMM_NUMBERS28 ", %28, %29, %30, %31"
#define JMM_NUMBERS36 JMM_NUMBERS32 ", %32, %33, %34, %35"
#define JMM_NUMBERS40 JMM_NUMBERS36 ", %36, %37, %38, %39"
#define JMM_NUMBERS44 JMM_NUMBERS40 ", %40, %41, %42, %43"
#define JMM_NUMBERS48 JMM_NUMBERS44 ", %44, %45, %46, %47"
#define JMM_NUMBERS52 JMM_NUMBERS48 ", %48, %49, %50, %51"
#define JMM_NUMBERS56 JMM_NUMBERS52 ", %52, %53, %54, %55"
#define JMM_NUMBERS60 JMM_NUMBERS56 ", %56, %57, %58, %59"
#define JMM_NUMBERS64 JMM_NUMBERS60 ", %60, %61, %62, %63"
#define JMM_NUMBERS68 JMM_NUMBERS64 ", %64, %65, %66, %67"
#define JMM_NUMBERS72 JMM_NUMBERS68 ", %68, %69, %70, %71"
#define JMM_NUMBERS80 JMM_NUMBERS72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define JMM_NUMBERS88 JMM_NUMBERS80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define JMM_NUMBERS96 JMM_NUMBERS88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define JMM_NUMBERS104 JMM_NUMBERS96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define JMM_NUMBERS112 JMM_NUMBERS104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define JMM_NUMBERS120 JMM_NUMBERS112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define JMM_NUMBERS128 JMM_NUMBERS120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define JMM_SUM "+f"
#define JMM_SUMS_AT(i) JMM_SUM(d[i]), JMM_SUM(d[i + 1]), JMM_SUM(d[i + 2]), JMM_SUM(d[i + 3])
#define JMM_SUMS4 JMM_SUMS_AT(0)
#define JMM_SUMS8 JMM_SUMS4, JMM_SUMS_AT(4)
#define JMM_SUMS12 JMM_SUMS8, JMM_SUMS_AT(8)
#define JMM_SUMS16 JMM_SUMS12, JMM_SUMS_AT(12)
#define JMM_SUMS20 JMM_SUMS16, JMM_SUMS_AT(16)
#define JMM_SUMS24 JMM_SUMS20, JMM_SUMS_AT(20)
#define JMM_SUMS28 JMM_SUMS24, JMM_SUMS_AT(24)
#define JMM_SUMS32 JMM_SUMS28, JMM_SUMS_AT(28)
#define JMM_SUMS36 JMM_SUMS32, JMM_SUMS_AT(32)
#define JMM_SUMS40 JMM_SUMS36, JMM_SUMS_AT(36)
#define JMM_SUMS44 JMM_SUMS40, JMM_SUMS_AT(40)
#define JMM_SUMS48 JMM_SUMS44, JMM_SUMS_AT(44)
#define JMM_SUMS52 JMM_SUMS48, JMM_SUMS_AT(48)
#define JMM_SUMS56 JMM_SUMS52, JMM_SUMS_AT(52)
#define JMM_SUMS60 JMM_SUMS56, JMM_SUMS_AT(56)
#define JMM_SUMS64 JMM_SUMS60, JMM_SUMS_AT(60)
#define JMM_SUMS68 JMM_SUMS64, JMM_SUMS_AT(64)
#define JMM_SUMS72 JMM_SUMS68, JMM_SUMS_AT(68)
#define JMM_SUMS80 JMM_SUMS72, JMM_SUMS_AT(72), JMM_SUMS_AT(76)
#define JMM_SUMS88 JMM_SUMS80, JMM_SUMS_AT(80), JMM_SUMS_AT(84)
#define JMM_SUMS96 JMM_SUMS88, JMM_SUMS_AT(88), JMM_SUMS_AT(92)
#define JMM_SUMS104 JMM_SUMS96, JMM_SUMS_AT(96), JMM_SUMS_AT(100)
#define JMM_SUMS112 JMM_SUMS104, JMM_SUMS_AT(104), JMM_SUMS_AT(108)
#define JMM_SUMS120 JMM_SUMS112, JMM_SUMS_AT(112), JMM_SUMS_AT(116)
#define JMM_SUMS128 JMM_SUMS120, JMM_SUMS_AT(120), JMM_SUMS_AT(124)

#define JMM_WGMMA(T, TYPE, N, NUMBERS, SUMS, A0, A1, A2, A3, B, ACCUMULATE)                                   \
  template <>                                                                                                 \
  struct Wgmma<T, N> {                                                                                        \
    __device__ __forceinline__ static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,         \
                                               int accumulate) {                                              \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" #N \
                   "k16.f32." TYPE "." TYPE " {" NUMBERS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B  \
                   ", p, 1, 1, 0; }"                                                                          \
                   : SUMS                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                    \
    }                                                                                                         \
  };
#define JMM_WGMMA_BOTH(N, SUMS, ...)                                           \
  JMM_WGMMA(BFloat, "bf16", N, JMM_NUMBERS##SUMS, JMM_SUMS##SUMS, __VA_ARGS__) \
  JMM_WGMMA(Half, "f16", N, JMM_NUMBERS##SUMS, JMM_SUMS##SUMS, __VA_ARGS__)
JMM_WGMMA_BOTH(8, 4, 4, 5, 6, 7, 8, 9)
JMM_WGMMA_BOTH(16, 8, 8, 9, 10, 11, 12, 13)
JMM_WGMMA_BOTH(24, 12, 12, 13, 14, 15, 16, 17)
JMM_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21)
JMM_WGMMA_BOTH(40, 20, 20, 21, 22, 23, 24, 25)
JMM_WGMMA_BOTH(48, 24, 24, 25, 26, 27, 28, 29)
JMM_WGMMA_BOTH(56, 28, 28, 29, 30, 31, 32, 33)
JMM_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
JMM_WGMMA_BOTH(72, 36, 36, 37, 38, 39, 40, 41)
JMM_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45)
JMM_WGMMA_BOTH(88, 44, 44, 45, 46, 47, 48, 49)
JMM_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53)
JMM_WGMMA_BOTH(104, 52, 52, 53, 54, 55, 56, 57)
JMM_WGMMA_BOTH(112, 56, 56, 57, 58, 59, 60, 61)
JMM_WGMMA_BOTH(120, 60, 60, 61, 62, 63, 64, 65)
JMM_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
JMM_WGMMA_BOTH(136, 68, 68, 69, 70, 71, 72, 73)
JMM_WGMMA_BOTH(144, 72, 72, 73, 74, 75, 76, 77)
JMM_WGMMA_BOTH(160, 80, 80, 81, 82, 83, 84, 85)
JMM_WGMMA_BOTH(176, 88, 88, 89, 90, 91, 92, 93)
JMM_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101)
JMM_WGMMA_BOTH(208, 104, 104, 105, 106, 107, 108, 109)
JMM_WGMMA_BOTH(224, 112, 112, 113, 114, 115, 116, 117)
JMM_WGMMA_BOTH(240, 120, 120, 121, 122, 123, 124, 125)
JMM_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133)
#undef JMM_WGMMA_BOTH
#undef JMM_WGMMA

// The same of bytes, 32 of K at a time, in registers of four: lane 4 g + t has rows g and g + 8 of a, bytes 4 t to
// 4 t + 3 and 4 t + 16 to 4 t + 19. Numbers of e4m3, or signed ones with exact sums.
#define JMM_WGMMA(T, SUM_TYPE, TYPES, N, NUMBERS, SUMS, A0, A1, A2, A3, B, ACCUMULATE, SCALES)                      \
  template <>                                                                                                       \
  struct Wgmma<T, N> {                                                                                              \
    __device__ __forceinline__ static void run(SUM_TYPE (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,            \
                                               int accumulate) {                                                    \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" #N       \
                   "k32." TYPES " {" NUMBERS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p" SCALES "; }" \
                   : SUMS                                                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                          \
    }                                                                                                               \
  };
#define JMM_WGMMA_BYTES(N, SUMS, ...) \
  JMM_WGMMA(JMM_T, JMM_SUM_TYPE, JMM_TYPES, N, JMM_NUMBERS##SUMS, JMM_SUMS##SUMS, __VA_ARGS__, JMM_SCALES)
#define JMM_WGMMA_ALL                              \
  JMM_WGMMA_BYTES(16, 8, 8, 9, 10, 11, 12, 13)     \
  JMM_WGMMA_BYTES(32, 16, 16, 17, 18, 19, 20, 21)  \
  JMM_WGMMA_BYTES(48, 24, 24, 25, 26, 27, 28, 29)  \
  JMM_WGMMA_BYTES(64, 32, 32, 33, 34, 35, 36, 37)  \
  JMM_WGMMA_BYTES(80, 40, 40, 41, 42, 43, 44, 45)  \
  JMM_WGMMA_BYTES(96, 48, 48, 49, 50, 51, 52, 53)  \
  JMM_WGMMA_BYTES(112, 56, 56, 57, 58, 59, 60, 61) \
  JMM_WGMMA_BYTES(128, 64, 64, 65, 66, 67, 68, 69)
#define JMM_T Fp8
#define JMM_SUM_TYPE float
#define JMM_TYPES "f32.e4m3.e4m3"
#define JMM_SCALES ", 1, 1"
JMM_WGMMA_ALL
#undef JMM_T
#undef JMM_SUM_TYPE
#undef JMM_TYPES
#undef JMM_SCALES
#undef JMM_SUM
#define JMM_T E5M2TimesFp8
#define JMM_SUM_TYPE float
#define JMM_TYPES "f32.e5m2.e4m3"
#define JMM_SCALES ", 1, 1"
#define JMM_SUM "+f"
JMM_WGMMA_ALL
#undef JMM_T
#undef JMM_SUM_TYPE
#undef JMM_TYPES
#undef JMM_SCALES
#undef JMM_SUM
#define JMM_T Signed8
#define JMM_SUM_TYPE int32_t
#define JMM_TYPES "s32.s8.s8"
#define JMM_SCALES ""
#define JMM_SUM "+r"
JMM_WGMMA_ALL
#undef JMM_T
#undef JMM_SUM_TYPE
#undef JMM_TYPES
#undef JMM_SCALES
#undef JMM_SUM
#undef JMM_WGMMA_ALL
#undef JMM_WGMMA_BYTES
#undef JMM_WGMMA

}  // namespace jmm
