// Every PTX instruction that the kernels use, one function each, and nothing else.
#pragma once

#include "types.cuh"

#if __CUDA_ARCH__ >= 800
#define JMM_HAS_CP_ASYNC 1
#else
#define JMM_HAS_CP_ASYNC 0
#endif

namespace jmm {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Of the eight bytes of two words, those that the lower four nibbles name, of 3 bits each. (`__byte_perm` masks them
// first.)
__device__ __forceinline__ uint32_t chosen_bytes(uint32_t low, uint32_t high, uint32_t nibbles) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(nibbles));
  return bytes;
}

// Copies 16 bytes to shared memory; asynchronous where the architecture can.
__device__ __forceinline__ void copy16(uint32_t shared, const void* global) {
#if JMM_HAS_CP_ASYNC
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
#else
  const int4 v = *static_cast<const int4*>(global);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// Copies kBytes, 4, 8 or 16, likewise. (Of an architecture with cp.async.)
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
#if JMM_HAS_CP_ASYNC
  if constexpr (kBytes == 16) {
    copy16(shared, global);
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(kBytes) : "memory");
  }
#endif
}

// The same, for bytes that are read once: they leave L2 first.
__device__ __forceinline__ void copy16_streamed(uint32_t shared, const void* global, uint64_t policy) {
#if JMM_HAS_CP_ASYNC
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "l"(policy)
               : "memory");
#else
  copy16(shared, global);
#endif
}

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 800
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

__device__ __forceinline__ uint64_t evict_normal_policy() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 800
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

__device__ __forceinline__ void commit_copies() {
#if JMM_HAS_CP_ASYNC
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's committed groups are still on their way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if JMM_HAS_CP_ASYNC
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// The larger number; NaN where one of them is NaN.
__device__ __forceinline__ float maximum_or_nan(float a, float b) {
  float larger;
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
#else
  larger = a != a || b != b ? a + b : a > b ? a : b;
#endif
  return larger;
}

// Named barrier `kId` of the CTA, for `threads` of its threads. An identifier that is not a constant would reserve all
// 16 barriers of a CTA, and a multiprocessor has 64.
template <int kId>
__device__ __forceinline__ void named_barrier_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "r"(threads) : "memory");
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

// Clusters of CTAs (sm_90 and up): a barrier for all their threads, and reads of each other's shared memory.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Where CTA `cta` of the cluster has what this one has at `shared`.
__device__ __forceinline__ uint32_t shared_of_cta(uint32_t shared, int cta) {
  uint32_t theirs = shared;
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared), "r"(cta));
#endif
  return theirs;
}

__device__ __forceinline__ float4 load_cluster16(uint32_t theirs) {
  float4 v{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(theirs));
#endif
  return v;
}

// Fragments of two 8 x 8 matrices of 16-bit values; lanes 0-7 address the rows of the first, 8-15 of the second.
__device__ __forceinline__ void load_matrices_x2(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row));
}

// The transpose of an 8 x 8 matrix of 16-bit values, which a warp holds in pairs: lane 4 r + c / 2 has columns c and
// c + 1 of row r.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t pairs) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pairs));
  return transposed;
}

// Of four; lanes 8 i to 8 i + 7 address the rows of the i-th.
__device__ __forceinline__ void load_matrices_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

// Of four, each transposed.
__device__ __forceinline__ void load_transposed_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

// d (16 x 8, float32) += a (16 x 8) * b (8 x 8), both of 32-bit floats whose last 13 bits do not count.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Rounded to the 11 bits that such a product reads.
__device__ __forceinline__ float round_to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  return value;
#endif
}

// The largest of a warp's values.
__device__ __forceinline__ uint32_t maximum_of_warp(uint32_t value) {
  uint32_t most = value;
#if __CUDA_ARCH__ >= 800
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(value));
#else
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) most = max(most, __shfl_xor_sync(~0u, most, distance));
#endif
  return most;
}

// The sum of four bytes and a number.
__device__ __forceinline__ uint32_t sum_of_bytes(uint32_t bytes, uint32_t sum) {
  asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(0x01010101));
  return sum;
}

// d (16 x 8, float32) += a (16 x 16) * b (16 x 8).
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // Turing multiplies 8 of K at a time: the same fragments, in two halves.
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma_16x8x16<BFloat>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// The same from zero sums: d = a * b.
template <class T>
__device__ __forceinline__ void mma_16x8x16_fresh(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;  // the compiler feeds the zero register, no instruction
  mma_16x8x16<T>(d, a, b);
}

// d (16 x 8) += a (16 x 32) * b (32 x 8), of bytes: e4m3 with float32 sums, or signed integers with sums of 32 bits.
template <class T>
__device__ __forceinline__ void mma_16x8x32(typename T::Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if __CUDA_ARCH__ >= 890
template <>
__device__ __forceinline__ void mma_16x8x32<Fp8>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma_16x8x32<Signed8>(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// (a & b) | c in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The value, of which the compiler does not know how it was made: it shares it rather than make variants of it.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  asm("" : "+r"(value));
  return value;
}

// The address in registers, as it is here: no compiler makes it anew where it is used.
template <class T>
__device__ __forceinline__ T* opaque(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}

// 2^value and 1 / value, off by a unit or two of the last place; numbers below 2^-126 are zero.
__device__ __forceinline__ float quick_power_of_two(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}
__device__ __forceinline__ float quick_reciprocal(float value) {
  float quotient;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(value));
  return quotient;
}

// The bits of a where mask has ones, those of b elsewhere. The compiler would rather clear bits of a or b beforehand,
// in an instruction more.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// a * b + c of both halves, rounded once.
template <class T>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c);

template <>
__device__ __forceinline__ uint32_t multiply_add_pairs<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <>  // sm_75 has no bfloat16, and no call gets there
__device__ __forceinline__ uint32_t multiply_add_pairs<BFloat>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}

// a * b of both halves. (bfloat16 has a product of its own on sm_90 alone; less zero, the sum is the product.)
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  constexpr uint32_t kMinusZeros = 0x80008000u;
  return multiply_add_pairs<T>(a, b, kMinusZeros);
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

template <class T>
__device__ __forceinline__ float to_float(uint16_t bits);

template <>
__device__ __forceinline__ float to_float<Half>(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

// Of the upper half of a pair: the conversion reads it there, which a shift before it hides from the compiler.
__device__ __forceinline__ float upper_half_to_float(uint32_t pair) {
  float f;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, high;\n}" : "=f"(f) : "r"(pair));
  return f;
}

#if __CUDA_ARCH__ >= 890
constexpr bool kConvertsE4M3 = true;
#else
constexpr bool kConvertsE4M3 = false;
#endif

// The two lower e4m3 numbers of a word as halves, exactly. Of an architecture that converts them.
__device__ __forceinline__ uint32_t halves_of_e4m3_pair(uint32_t codes) {
  uint32_t values = 0;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(values) : "r"(codes));
#endif
  return values;
}

// The two upper ones.
__device__ __forceinline__ uint32_t halves_of_upper_e4m3_pair(uint32_t codes) {
  uint32_t values = 0;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}"
      : "=r"(values)
      : "r"(codes));
#endif
  return values;
}

template <>
__device__ __forceinline__ float to_float<BFloat>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ uint16_t from_float(float value);

template <>
__device__ __forceinline__ uint16_t from_float<Half>(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// A pair of it.
template <class T>
__device__ __forceinline__ uint32_t paired_from_float(float value);

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ uint16_t from_float<BFloat>(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t paired_from_float<BFloat>(float value) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t paired_from_float<Half>(float value) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
  return pair;
}
#endif

}  // namespace jmm
