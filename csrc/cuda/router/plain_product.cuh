// The router's product without tensor cores, for architectures, types and extents that product.cuh does not have: a
// thread has one column of the logits, and sums its products with a tile of tokens in float32.
#pragma once

#include "offsets.cuh"
#include "ptx/synchronization.cuh"
#include "router/element.cuh"
#include "token_count.cuh"

namespace jmm {

// Facts: jax_marlin_moe/cuda/kernels/router.py.
template <class Facts>
struct PlainRouterProduct {
  using X = typename Facts::Element;        // of the rows, any float
  using R = typename Facts::RouterElement;  // of the router
  using G = typename Facts::GateElement;    // of the gate
  using S = typename Facts::ScaleElement;   // of the scale
  static constexpr int kTokens = Facts::kTokens, kExperts = Facts::kExperts;
  static constexpr int kK = Facts::kK, kRowStride = Facts::kRowStride;    // rows of x may have padding
  static constexpr int kTile = Facts::kTile, kColumns = Facts::kColumns;  // tokens and columns of a CTA
  static constexpr int kSlices = Facts::kSlices, kBlock = Facts::kBlock;  // of K
  static constexpr int kStride = Facts::kStride;                          // of a token's logits
  static constexpr bool kGated = Facts::kGated, kNormed = Facts::kNormed;
  static constexpr int kThreads = kColumns;
  static constexpr int kAllColumns = kExperts + kGated + kNormed;  // behind the logits: the gate's, and the squares
  static constexpr int kTokenTiles = (kTokens + kTile - 1) / kTile;
  static constexpr int kColumnTiles = (kAllColumns + kColumns - 1) / kColumns;
  static constexpr int kMaxCtas = kTokenTiles * kColumnTiles * kSlices;
  static constexpr int kBlocks = (kK + kBlock - 1) / kBlock;
  static constexpr int kSharedBytes = kBlock * kTile * 4;
  static_assert(kTile % 4 == 0, "tokens are read four at a time");

  const X* __restrict__ x;       // [kTokens, kRowStride]
  const R* __restrict__ router;  // [kK, kExperts]
  const G* __restrict__ gate;    // [kK] if kGated
  const S* __restrict__ scale;   // [kK] if kNormed
  float* __restrict__ logits;    // [kSlices, kTokens, kStride]
  [[no_unique_address]] TokenCount<Facts::kCounted> count;

  __device__ void run(unsigned char* shared_bytes) const {
    float (*const tokens)[kTile] = reinterpret_cast<float (*)[kTile]>(shared_bytes);  // [kBlock]
    const int slice = blockIdx.x % kSlices, column_tile = blockIdx.x / kSlices % kColumnTiles;
    const int first_token = blockIdx.x / (kSlices * kColumnTiles) * kTile;
    const int column = column_tile * kColumns + threadIdx.x;
    const int first_block = int64_t(slice) * kBlocks / kSlices, last_block = int64_t(slice + 1) * kBlocks / kSlices;
    allow_next_kernel();
    wait_for_previous_kernel();

    float sums[kTile] = {};
#pragma unroll 1
    for (int block = first_block; block < last_block; ++block) {
      const int k = block * kBlock, rows = min(kBlock, kK - k);
      __syncthreads();
      for (int i = threadIdx.x; i < kBlock * kTile; i += kThreads) {
        const int row = i % kBlock, token = i / kBlock;
        const bool there = row < rows && first_token + token < count.of(kTokens);
        tokens[row][token] = there ? number(x[int64_t(first_token + token) * kRowStride + k + row]) : 0.0f;
      }
      __syncthreads();
      if (column >= kAllColumns) continue;
#pragma unroll 8
      for (int row = 0; row < rows; ++row) {
        const bool squares = kNormed && column == kAllColumns - 1;
        const float weight = squares ? 0.0f : weight_of(k + row, column);
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
          const float value = tokens[row][t];
          sums[t] = fmaf(value, squares ? value : weight, sums[t]);
        }
      }
    }
    if (column >= kAllColumns) return;
    float* const out = logits + int64_t(slice) * kTokens * kStride + column;
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (first_token + t < count.of(kTokens)) out[int64_t(first_token + t) * kStride] = sums[t];
    }
  }

 private:
  __device__ __forceinline__ float weight_of(int k, int column) const {
    if constexpr (kGated) {
      if (column == kExperts) return number(gate[k]);
    }
    float value = number(router[int64_t(k) * kExperts + column]);
    if constexpr (kNormed) value *= number(scale[k]);
    return value;
  }
};

}  // namespace jmm
