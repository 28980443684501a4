// Shares of sums over devices: packed before they are sent, and added up by the device that keeps the sum.
#pragma once

#include "four_columns.cuh"
#include "offsets.cuh"
#include "ptx/numbers.cuh"

namespace jmm {

// float32 numbers as `FourColumns` of neighbours. Facts of both: jax_marlin_moe/cuda/kernels/shares.py.
template <class Facts>
struct PackShare {
  static constexpr int64_t kNumbers = Facts::kNumbers;
  static constexpr int kThreads = 128;
  static constexpr int kVector = 8;  // numbers of a thread
  static constexpr int64_t kPieces = kNumbers / kVector;
  static constexpr int64_t kMaxCtas = (kPieces + kThreads - 1) / kThreads;
  static_assert(kNumbers % kVector == 0, "whole vectors");

  const float* __restrict__ share;  // [kNumbers]
  int32_t* __restrict__ words;      // [kNumbers / 2]

  __device__ void run() const {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= kPieces) return;
    const float4 first = reinterpret_cast<const float4*>(share)[2 * i];
    const float4 second = reinterpret_cast<const float4*>(share)[2 * i + 1];
    const uint2 low = FourColumns::pack(first.x, first.y, first.z, first.w);
    const uint2 high = FourColumns::pack(second.x, second.y, second.z, second.w);
    reinterpret_cast<uint4*>(words)[i] = uint4{low.x, low.y, high.x, high.y};
  }
};

// The sum of packed shares, in the order of the devices, rounded once.
template <class Facts>
struct AddShares {
  using T = typename Facts::Element;  // of the sum
  static constexpr int64_t kNumbers = Facts::kNumbers;
  static constexpr int kShares = Facts::kShares;
  static constexpr bool kApart = Facts::kApart;  // two shares, in arrays of their own
  static constexpr int kThreads = 128;
  static constexpr int kVector = 8;                         // numbers of a thread
  static constexpr int kAhead = kShares < 8 ? kShares : 8;  // loads on their way at a time
  static constexpr int64_t kPieces = kNumbers / kVector;
  static constexpr int64_t kMaxCtas = (kPieces + kThreads - 1) / kThreads;
  static_assert(kNumbers % kVector == 0, "whole vectors");

  static_assert(!kApart || kShares == 2, "one array, or two shares");

  const int32_t* __restrict__ words;  // [kShares, kNumbers / 2], or the first share
  const int32_t* __restrict__ other;  // the second one if kApart
  T* __restrict__ sum;                // [kNumbers]

  __device__ void run() const {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= kPieces) return;
    float4 sums[2] = {};
#pragma unroll 1
    for (int first = 0; first < kShares; first += kAhead) {
      uint4 parts[kAhead];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        if (first + s < kShares) parts[s] = piece(first + s, i);
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        if (first + s >= kShares) continue;
        FourColumns::add(sums[0], uint2{parts[s].x, parts[s].y});
        FourColumns::add(sums[1], uint2{parts[s].z, parts[s].w});
      }
    }
    if constexpr (kSame<T, float>) {
      reinterpret_cast<float4*>(sum)[2 * i] = sums[0];
      reinterpret_cast<float4*>(sum)[2 * i + 1] = sums[1];
    } else {
      reinterpret_cast<uint4*>(sum)[i] = uint4{both(sums[0].x, sums[0].y), both(sums[0].z, sums[0].w),
                                               both(sums[1].x, sums[1].y), both(sums[1].z, sums[1].w)};
    }
  }

 private:
  __device__ __forceinline__ uint4 piece(int share, int64_t i) const {
    if constexpr (kApart) return reinterpret_cast<const uint4*>(share == 0 ? words : other)[i];
    return reinterpret_cast<const uint4*>(words)[share * kPieces + i];
  }
  __device__ __forceinline__ static uint32_t both(float first, float second) {
    return from_float<T>(first) | uint32_t(from_float<T>(second)) << 16;
  }
};

}  // namespace jmm
