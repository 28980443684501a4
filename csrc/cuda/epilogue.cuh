// What becomes of finished float32 sums: bias, activation or router weight, one rounding, the store.
//
// An epilogue is called for one slot and one column at a time; sums of neighbouring lanes are neighbouring columns.
// `factor(slot)` is what the slot's row is multiplied by, fetched before the product begins. The expert's type is one
// that its offset into the biases fits. Facts: jax_marlin_moe/cuda/kernels/epilogue.py.
#pragma once

#include "activations.cuh"
#include "ptx/ptx.cuh"

namespace jmm {

// out[slot, column] = activation(gate + bias, up + bias), rounded to T: the input of the second product. Without a
// gate there is one half of kColumns, which the first argument has.
template <class Facts>
struct Activated {
  using T = typename Facts::Element;  // of the result
  using Activation = typename Facts::Activation;
  static constexpr int kColumns = Facts::kColumns;
  static constexpr bool kBias = Facts::kBias;  // whether there is a bias

  T* __restrict__ out;             // [slots, kColumns]
  const float* __restrict__ bias;  // [experts, halves * kColumns] if kBias

  static constexpr bool kGated = Activation::kGated;

  __device__ __forceinline__ float factor(int) const { return 1.0f; }

  template <class Expert>
  __device__ __forceinline__ void store(Expert expert, int slot, float, int column, float gate, float up) const {
    if constexpr (kBias) {
      const float* row = bias + expert * ((kGated ? 2 : 1) * kColumns) + column;
      gate += row[0];
      if constexpr (kGated) up += row[kColumns];
    }
    out[int64_t(slot) * kColumns + column].bits = from_float<T>(Activation::apply(gate, up));
  }
};

// out[slot, column] = (sum + bias) * router weight, rounded to T.
template <class Facts>
struct SlotRows {
  using T = typename Facts::Element;  // of the result
  static constexpr int kColumns = Facts::kColumns;
  static constexpr bool kBias = Facts::kBias;          // whether there is a bias
  static constexpr bool kWeighted = Facts::kWeighted;  // whether there are router weights

  T* __restrict__ out;                     // [slots, kColumns]
  const float* __restrict__ bias;          // [experts, kColumns] if kBias
  const float* __restrict__ topk_weights;  // [slots] if kWeighted

  static constexpr bool kGated = false;

  __device__ __forceinline__ float factor(int slot) const {
    if constexpr (kWeighted) return topk_weights[slot];
    return 1.0f;
  }

  template <class Expert>
  __device__ __forceinline__ void store(Expert expert, int slot, float factor, int column, float sum, float) const {
    if constexpr (kBias) sum += bias[expert * kColumns + column];
    if constexpr (kWeighted) sum *= factor;
    out[int64_t(slot) * kColumns + column].bits = from_float<T>(sum);
  }
};

// The same in float32, for the sum over a token's experts that follows.
template <class Facts>
struct SlotPartials {
  static constexpr int kColumns = Facts::kColumns;
  static constexpr bool kBias = Facts::kBias;          // whether there is a bias
  static constexpr bool kWeighted = Facts::kWeighted;  // whether there are router weights

  float* __restrict__ out;                 // [slots, kColumns]
  const float* __restrict__ bias;          // [experts, kColumns] if kBias
  const float* __restrict__ topk_weights;  // [slots] if kWeighted

  static constexpr bool kGated = false;

  __device__ __forceinline__ float factor(int slot) const {
    if constexpr (kWeighted) return topk_weights[slot];
    return 1.0f;
  }

  template <class Expert>
  __device__ __forceinline__ void store(Expert expert, int slot, float factor, int column, float sum, float) const {
    if constexpr (kBias) sum += bias[expert * kColumns + column];
    if constexpr (kWeighted) sum *= factor;
    out[int64_t(slot) * kColumns + column] = sum;
  }
};

}  // namespace jmm
