// The last step of a block: sums each token's slots in ascending order, adds what experts without weights return, their
// input, and rounds once.
#pragma once

#include "offsets.cuh"
#include "ptx/ptx.cuh"
#include "token_tiles.cuh"

namespace jmm {

// Facts of all three: jax_marlin_moe/cuda/kernels/combine.py.
template <class Facts>
struct Combine {
  using T = typename Facts::Element;  // of the result
  using X = typename Facts::Input;    // of x
  static constexpr int kTokens = Facts::kTokens, kTopK = Facts::kTopK, kColumns = Facts::kColumns;
  static constexpr int kExperts = Facts::kExperts;              // of the matrices
  static constexpr int kRoutedExperts = Facts::kRoutedExperts;  // that topk_ids may name
  static constexpr bool kMapped = Facts::kMapped;               // whether there is an expert_map
  // Experts from kRoutedExperts on that return their input, of which there are kInputColumns.
  static constexpr int kIdentityExperts = Facts::kIdentityExperts, kInputColumns = Facts::kInputColumns;
  static constexpr int kThreads = 128;                 // small: they move in beside the CTAs of the kernel before
  static constexpr int kVector = 4;                    // columns of a thread: one 16-byte load a slot
  static constexpr int kVectors = kColumns / kVector;  // of a row
  static constexpr int64_t kAllVectors = int64_t(kTokens) * kVectors;
  static constexpr int64_t kMaxCtas = (kAllVectors + kThreads - 1) / kThreads;
  using VectorIndex = Index<kAllVectors + kThreads>;
  static_assert(kColumns % kVector == 0 && kInputColumns % kVector == 0, "rows are whole vectors");

  const float* __restrict__ partials;      // [kTokens * kTopK, kColumns]; rows of dropped slots hold nothing
  const int32_t* __restrict__ topk_ids;    // [kTokens, kTopK]
  const int32_t* __restrict__ expert_map;  // [kRoutedExperts] if kMapped
  // If there are identity experts: the layer's input, and the slots' weights, from a kernel of this call.
  const X* __restrict__ x;    // [kTokens, kInputColumns]
  const float* topk_weights;  // [kTokens, kTopK]
  T* __restrict__ out;        // [kTokens, kColumns]

  __device__ void run() const {
    const VectorIndex i = Offset<kAllVectors + kThreads>(blockIdx.x) * kThreads + threadIdx.x;
    const int token = min(i / kVectors, VectorIndex(kTokens - 1)), vector = i % kVectors;
    // The ids were there before this call: they are fetched while the kernel before still runs.
    uint32_t there[(kTopK + 31) / 32] = {};
#pragma unroll
    for (int j = 0; j < kTopK; ++j) {
      const int slot = token * kTopK + j;
      const int expert = expert_of_slot<kExperts, kRoutedExperts, kMapped>(topk_ids, expert_map, slot);
      there[j / 32] |= uint32_t(expert >= 0) << (j % 32);
    }
    allow_next_kernel();
    wait_for_previous_kernel();
    if (i >= kAllVectors) return;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kTopK; ++j) {
      if (!(there[j / 32] >> (j % 32) & 1)) continue;
      const float4 part = reinterpret_cast<const float4*>(partials)[int64_t(token * kTopK + j) * kVectors + vector];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    if constexpr (kIdentityExperts > 0) add_input(sum, token, vector);
    if constexpr (kSame<T, float>) {
      reinterpret_cast<float4*>(out)[i] = sum;
    } else {
      reinterpret_cast<uint2*>(out)[i] = uint2{from_float<T>(sum.x) | uint32_t(from_float<T>(sum.y)) << 16,
                                               from_float<T>(sum.z) | uint32_t(from_float<T>(sum.w)) << 16};
    }
  }

 private:
  // A vector of the token's input, times the weights of the identity experts that it has chosen.
  __device__ __forceinline__ void add_input(float4& sum, int token, int vector) const {
    constexpr int kInputVectors = kInputColumns / kVector;
    float weight = 0.0f;
#pragma unroll
    for (int j = 0; j < kTopK; ++j) {
      const int expert = topk_ids[token * kTopK + j];
      if (expert >= kRoutedExperts && expert < kRoutedExperts + kIdentityExperts)
        weight += topk_weights[token * kTopK + j];
    }
    if (vector >= kInputVectors) return;
    const uint2 pairs = reinterpret_cast<const uint2*>(x)[int64_t(token) * kInputVectors + vector];
    sum.x = fmaf(to_float<X>(static_cast<uint16_t>(pairs.x)), weight, sum.x);
    sum.y = fmaf(to_float<X>(static_cast<uint16_t>(pairs.x >> 16)), weight, sum.y);
    sum.z = fmaf(to_float<X>(static_cast<uint16_t>(pairs.y)), weight, sum.z);
    sum.w = fmaf(to_float<X>(static_cast<uint16_t>(pairs.y >> 16)), weight, sum.w);
  }
};

// Rows that no block lists are zero: the output is cleared before the product writes into it. No row of the list is
// known yet to be its slot's first.
template <class Facts>
struct Clear {
  using T = typename Facts::Element;  // of the result
  static constexpr int kSlots = Facts::kSlots, kColumns = Facts::kColumns;
  static constexpr int kThreads = 256;
  static constexpr int64_t kBytes = int64_t(kSlots) * kColumns * sizeof(T);
  static constexpr int64_t kPieces = kBytes / 16;
  static constexpr int64_t kMaxCtas = (kPieces + kThreads - 1) / kThreads;
  using PieceIndex = Index<kPieces + kThreads>;
  static_assert(kBytes % 16 == 0, "cleared in 16-byte stores");
  static_assert(kPieces >= kSlots, "a thread has one slot at most");

  T* __restrict__ out;               // [kSlots, kColumns]
  int32_t* __restrict__ first_rows;  // [kSlots]

  __device__ void run() const {
    const PieceIndex i = Offset<kPieces + kThreads>(blockIdx.x) * kThreads + threadIdx.x;
    wait_for_previous_kernel();
    allow_next_kernel();
    if (i < kPieces) reinterpret_cast<int4*>(out)[i] = int4{0, 0, 0, 0};
    if (i < kSlots) first_rows[i] = kNoRow;
  }
};

// Where the list has each slot first, in a block with an expert. A list that was made by hand may have a slot again:
// the first one counts.
template <class Facts>
struct FindFirstRows {
  static constexpr int kSlots = Facts::kSlots, kExperts = Facts::kExperts;
  static constexpr int kListBlock = Facts::kListBlock, kListLength = Facts::kListLength;
  static constexpr int kThreads = 256;
  static constexpr int kMaxCtas = kListLength > 0 ? (kListLength + kThreads - 1) / kThreads : 1;

  const int32_t* __restrict__ sorted_token_ids;        // [kListLength]
  const int32_t* __restrict__ expert_ids;              // [ceil(kListLength / kListBlock)]
  const int32_t* __restrict__ num_tokens_post_padded;  // [1]
  int32_t* __restrict__ first_rows;                    // [kSlots], of kNoRow

  __device__ void run() const {
    const int row = blockIdx.x * kThreads + threadIdx.x;
    const bool listed = row < min(kListLength, *num_tokens_post_padded);
    const int slot = listed ? sorted_token_ids[row] : -1, expert = listed ? expert_ids[row / kListBlock] : -1;
    allow_next_kernel();
    wait_for_previous_kernel();
    if (slot >= 0 && slot < kSlots && expert >= 0 && expert < kExperts) atomicMin(&first_rows[slot], row);
  }
};

}  // namespace jmm
