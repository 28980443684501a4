// The backward pass of a gated activation: from cotangents of its results to those of gate, up and router weights
// (docs/kernels.md, "The product with the transpose").
#pragma once

#include "activations.cuh"
#include "ptx/numbers.cuh"

namespace jmm {

// A warp has a slot. Facts: jax_marlin_moe/cuda/kernels/hidden_cotangents.py.
template <class Facts>
struct HiddenCotangents {
  using T = typename Facts::Element;      // of what is read
  using Result = typename Facts::Result;  // of d_hidden
  using Activation = typename Facts::Activation;
  static constexpr int kSlots = Facts::kSlots;
  static constexpr int kColumns = Facts::kColumns;  // of gate, and of up
  static constexpr int kInner = Facts::kInner;      // of the activation's results that count: the first ones
  static constexpr int kExperts = Facts::kExperts;
  static constexpr bool kBias = Facts::kBias;
  static constexpr int kThreads = 128, kWarps = kThreads / 32;
  static constexpr int kMaxCtas = (kSlots + kWarps - 1) / kWarps;
  static constexpr int kVector = 8;  // columns of a lane
  static_assert(Activation::kGated, "a column has gate and up");
  static_assert(kColumns % kVector == 0 && kInner % kVector == 0 && kInner <= kColumns, "rows are whole vectors");

  // Rows of slots without an expert hold nothing. `hidden` and `d_hidden` may be one array.
  const T* hidden;                         // [kSlots, 2 * kColumns], without the bias
  const T* __restrict__ pulled;            // [kSlots, kInner]
  const int32_t* __restrict__ experts;     // [kSlots]
  const float* __restrict__ topk_weights;  // [kSlots]
  const float* __restrict__ bias;          // [kExperts, 2 * kColumns] if kBias
  Result* d_hidden;                        // [kSlots, 2 * kColumns]; zeros of slots without an expert
  float* __restrict__ d_weights;           // [kSlots], likewise

  __device__ void run() const {
    const int64_t slot = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (slot >= kSlots) return;
    const int expert = experts[slot];
    const bool there = expert >= 0 && expert < kExperts;
    const float weight = there ? topk_weights[slot] : 0.0f;
    float sum = 0.0f;
    for (int column = lane * kVector; column < kColumns; column += 32 * kVector) {
      const int64_t place = slot * (2 * kColumns) + column;
      float d_gate[kVector] = {}, d_up[kVector] = {};
      if (there && column < kInner) {
        float gate[kVector], up[kVector], cotangent[kVector];
        load(gate, hidden + place);
        load(up, hidden + place + kColumns);
        load(cotangent, pulled + slot * kInner + column);
        if constexpr (kBias) {
          add(gate, bias + int64_t(expert) * (2 * kColumns) + column);
          add(up, bias + int64_t(expert) * (2 * kColumns) + kColumns + column);
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const Dual along_gate = Activation::apply(Dual{gate[i], 1.0f}, Dual{up[i], 0.0f});
          const Dual along_up = Activation::apply(Dual{gate[i], 0.0f}, Dual{up[i], 1.0f});
          sum = fmaf(to_float<T>(from_float<T>(along_gate.value)), cotangent[i], sum);
          const float weighted = cotangent[i] * weight;
          d_gate[i] = along_gate.slope * weighted, d_up[i] = along_up.slope * weighted;
        }
      }
      store(d_hidden + place, d_gate);
      store(d_hidden + place + kColumns, d_up);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) d_weights[slot] = sum;
  }

 private:
  __device__ __forceinline__ static void load(float (&values)[kVector], const T* source) {
    const uint4 words = *reinterpret_cast<const uint4*>(source);
    const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = to_float<T>(static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16)));
  }

  __device__ __forceinline__ static void add(float (&values)[kVector], const float* source) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] += source[i];
  }

  __device__ __forceinline__ static void store(float* target, const float (&values)[kVector]) {
    float4* vectors = reinterpret_cast<float4*>(target);
    vectors[0] = {values[0], values[1], values[2], values[3]};
    vectors[1] = {values[4], values[5], values[6], values[7]};
  }
  __device__ __forceinline__ static void store(T* target, const float (&values)[kVector]) {
    uint32_t pairs[kVector / 2];
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      pairs[i] = from_float<T>(values[2 * i]) | uint32_t(from_float<T>(values[2 * i + 1])) << 16;
    }
    *reinterpret_cast<uint4*>(target) = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
};

}  // namespace jmm
