// The router's product, in float32: logits of a tile of tokens and a tile of experts over a slice of K.
//
// The router is the A operand (16 experts by K), the tokens the B operand, 8 at a time. A CTA copies blocks of K into a
// ring of stages; a block's sums are added to those of the blocks before in float32, so that a sum is rounded as often
// as a plain one, no more. Rows and a router of one 16-bit type are multiplied as they are; any others as 32-bit floats
// of 11 bits, which hold all 16-bit numbers, and float32 numbers in two parts. Every product is exact, but for parts of
// float32 numbers that are less than half of their last bit.
//
// Where rows are normed and scaled for the router, the scale multiplies the router's numbers, and the norm, which needs
// all of K, is left to the choice: the squares of a row are added here.
#pragma once

#include "offsets.cuh"
#include "ptx/copies.cuh"
#include "ptx/matrices.cuh"
#include "ptx/memory.cuh"
#include "ptx/numbers.cuh"
#include "ptx/synchronization.cuh"
#include "router/element.cuh"
#include "token_count.cuh"

namespace jmm {

// Facts: jax_marlin_moe/cuda/kernels/router.py.
template <class Facts>
struct RouterProduct {
  using X = typename Facts::Element;        // of the rows, 16 bits
  using R = typename Facts::RouterElement;  // of the router
  using G = typename Facts::GateElement;    // of the gate
  using S = typename Facts::ScaleElement;   // of the scale
  static constexpr int kTokens = Facts::kTokens, kExperts = Facts::kExperts;
  static constexpr int kK = Facts::kK, kRowStride = Facts::kRowStride;    // rows of x may have padding
  static constexpr int kTile = Facts::kTile, kColumns = Facts::kColumns;  // tokens and experts of a CTA
  static constexpr int kSlices = Facts::kSlices;
  static constexpr int kBlock = Facts::kBlock, kStages = Facts::kStages;    // of K
  static constexpr int kWarpsN = Facts::kWarpsN, kWarpsT = Facts::kWarpsT;  // along experts, and tokens
  static constexpr int kStride = Facts::kStride;  // of a token's logits, the gate's behind the experts'
  static constexpr bool kGated = Facts::kGated;
  static constexpr bool kNormed = Facts::kNormed;  // rows are to be normed and scaled; their squares are added too
  static constexpr int kThreads = 32 * kWarpsN * kWarpsT;
  static constexpr int kTokenTiles = (kTokens + kTile - 1) / kTile;
  static constexpr int kColumnTiles = (kExperts + kColumns - 1) / kColumns;
  static constexpr int kMaxCtas = kTokenTiles * kColumnTiles * kSlices;
  static constexpr int kBlocks = (kK + kBlock - 1) / kBlock;
  static constexpr int kSteps = kBlock / 16;
  static constexpr bool kPairs = kSame<X, R> && !kNormed;  // multiplied as they are
  static constexpr int kNumberBytes = sizeof(R);
  static constexpr int kRouterRow = kColumns * kNumberBytes + 16, kTokenRow = kBlock * 2 + 16;  // no bank conflicts
  static constexpr int kTokensAt = kBlock * kRouterRow, kStageBytes = kTokensAt + kTile * kTokenRow;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kExpertRow = kExperts * kNumberBytes;
  static constexpr int kCopy = kExpertRow % 16 == 0 ? 16 : kExpertRow % 8 == 0 ? 8 : 4;  // bytes at a time
  static constexpr int kExpertTiles = kColumns / kWarpsN / 16;                           // of a warp
  static constexpr int kRows = kTile / kWarpsT / 8;                                      // eights of tokens of a warp
  static_assert(kK % 16 == 0 && kRowStride % 8 == 0 && kExpertRow % 4 == 0, "whole steps and whole copies");
  static_assert(kExpertTiles * kWarpsN * 16 == kColumns && kRows * kWarpsT * 8 == kTile, "whole tiles");
  static_assert(kRows == 1 || kRows % 2 == 0, "two eights of tokens at a time");
  static_assert(kSlices <= kBlocks, "a slice has blocks");

  const X* __restrict__ x;       // [kTokens, kRowStride]
  const R* __restrict__ router;  // [kK, kExperts]
  const G* __restrict__ gate;    // [kK] if kGated
  const S* __restrict__ scale;   // [kK] if kNormed
  float* __restrict__ logits;    // [kSlices, kTokens, kStride]; then the gate's, then the sum of squares
  [[no_unique_address]] TokenCount<Facts::kCounted> count;

  using Fragment = uint32_t[4];

  __device__ void run(unsigned char* shared_bytes) const {
    const int slice = blockIdx.x % kSlices, column_tile = blockIdx.x / kSlices % kColumnTiles;
    const int first_token = blockIdx.x / (kSlices * kColumnTiles) * kTile;
    allow_next_kernel();
    wait_for_previous_kernel();
    add_slice(shared_bytes, slice, column_tile, first_token,
              logits + (int64_t(slice) * kTokens + first_token) * kStride);
  }

  // A tile's sums over a slice of K, to rows of kStride that begin with that of its first token.
  __device__ __forceinline__ void add_slice(unsigned char* shared_bytes, int slice, int column_tile, int first_token,
                                            float* out) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_expert = column_tile * kColumns;
    const int first_block = int64_t(slice) * kBlocks / kSlices,
              blocks = int64_t(slice + 1) * kBlocks / kSlices - first_block;
    const uint32_t ring = smem_address(shared_bytes);

#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < blocks) load(ring + s * kStageBytes, first_block + s, first_token, first_expert);
      commit_copies();
    }
    float sums[kExpertTiles][kRows][4] = {};
    float gate_sums[kRowParts] = {}, squares[kRowParts] = {};
    int stage = 0;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      wait_copies<kStages - 2>();
      __syncthreads();  // everybody's copies have arrived, and nobody reads the stage that is filled next
      if (block + kStages - 1 < blocks) {
        load(ring + (stage == 0 ? kStages - 1 : stage - 1) * kStageBytes, first_block + block + kStages - 1,
             first_token, first_expert);
      }
      commit_copies();
      const int steps = min(kSteps, (kK - (first_block + block) * kBlock) / 16);
      multiply(sums, ring + stage * kStageBytes, first_block + block, steps, warp, lane);
      if constexpr (kGated || kNormed) {
        if (column_tile == 0) {
          weigh(gate_sums, squares, shared_bytes + stage * kStageBytes, first_block + block, steps);
        }
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }

    const int expert = first_expert + warp % kWarpsN * kExpertTiles * 16 + lane / 4;
    const int token = warp / kWarpsN * kRows * 8 + lane % 4 * 2;  // of the tile
#pragma unroll
    for (int m = 0; m < kExpertTiles; ++m)
#pragma unroll
      for (int n = 0; n < kRows; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int e = expert + m * 16 + i / 2 * 8, t = token + n * 8 + i % 2;
          if (e < kExperts && first_token + t < count.of(kTokens)) out[int64_t(t) * kStride + e] = sums[m][n][i];
        }
    if (column_tile == 0) {
      if constexpr (kGated) store_row_sums(out + kExperts, gate_sums, first_token);
      if constexpr (kNormed) store_row_sums(out + kExperts + kGated, squares, first_token);
    }
  }

 private:
  // A block of K: its rows of the router, and the tokens' pieces.
  __device__ __forceinline__ void load(uint32_t stage, int block, int first_token, int first_expert) const {
    const int k = block * kBlock, rows = min(kBlock, kK - k);
    constexpr int kPieces = kColumns * kNumberBytes / kCopy, kAllPieces = kBlock * kPieces;
    const unsigned char* const source =
        reinterpret_cast<const unsigned char*>(router) + int64_t(k) * kExpertRow + first_expert * kNumberBytes;
    const int bytes = kExpertRow - first_expert * kNumberBytes;  // of a row, from the tile's first expert on
#pragma unroll
    for (int i = 0; i < (kAllPieces + kThreads - 1) / kThreads; ++i) {
      const int piece = i * kThreads + threadIdx.x, row = piece / kPieces, at = piece % kPieces * kCopy;
      if (row < rows && at < bytes) {
        copy_async<kCopy>(stage + row * kRouterRow + at, source + int64_t(row) * kExpertRow + at);
      }
    }
    constexpr int kTokenPieces = kBlock / 8, kAllTokenPieces = kTile * kTokenPieces;
#pragma unroll
    for (int i = 0; i < (kAllTokenPieces + kThreads - 1) / kThreads; ++i) {
      const int piece = i * kThreads + threadIdx.x, token = piece / kTokenPieces, at = piece % kTokenPieces * 8;
      if (token < kTile && first_token + token < count.of(kTokens) && at < rows) {
        copy_async<16>(stage + kTokensAt + token * kTokenRow + at * 2,
                       x + int64_t(first_token + token) * kRowStride + k + at);
      }
    }
  }

  // A number of the router in shared memory, at row k of block `block`.
  __device__ __forceinline__ float router_number(uint32_t stage, int block, int k, int expert) const {
    const uint32_t at = stage + k * kRouterRow + expert * kNumberBytes;
    float value;
    if constexpr (kNumberBytes == 2) {
      value = to_float<R>(static_cast<uint16_t>(load_shared2(at)));
    } else {
      value = __uint_as_float(load_shared4(at));
    }
    if constexpr (kNormed) value *= number(scale[block * kBlock + k]);
    return value;
  }

  __device__ __forceinline__ void multiply(float (&sums)[kExpertTiles][kRows][4], uint32_t stage, int block, int steps,
                                           int warp, int lane) const {
    const int first_expert = warp % kWarpsN * kExpertTiles * 16, first_token = warp / kWarpsN * kRows * 8;
    float fresh[kExpertTiles][kRows][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step >= steps) break;
      // Tokens: two eights at a time, each in two halves of the step's K.
      uint32_t tokens[kRows][2];
      const uint32_t token_row = stage + kTokensAt + (first_token + lane % 8) * kTokenRow + step * 32;
      if constexpr (kRows == 1) {
        load_matrices_x2(tokens[0], token_row + lane / 8 % 2 * 16);
      } else {
#pragma unroll
        for (int n = 0; n < kRows; n += 2) {
          uint32_t four[4];
          load_matrices_x4(four, token_row + (n + lane / 16) * 8 * kTokenRow + lane / 8 % 2 * 16);
          tokens[n][0] = four[0], tokens[n][1] = four[1], tokens[n + 1][0] = four[2], tokens[n + 1][1] = four[3];
        }
      }
#pragma unroll
      for (int m = 0; m < kExpertTiles; ++m) {
        if constexpr (kNumberBytes == 2 && !kNormed) {
          Fragment experts;
          load_transposed_x4(experts, stage + (step * 16 + lane / 16 * 8 + lane % 8) * kRouterRow +
                                          (first_expert + m * 16 + lane / 8 % 2 * 8) * 2);
#pragma unroll
          for (int n = 0; n < kRows; ++n) {
            if constexpr (kPairs) {
              mma_16x8x16<X>(fresh[m][n], experts, tokens[n]);
            } else {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                // Which of the eight numbers of K are the first four does not matter, as long as both operands agree.
                const uint32_t a0 = experts[2 * half], a1 = experts[2 * half + 1];
                const Fragment wide = {low_number<R>(a0), low_number<R>(a1), high_number<R>(a0), high_number<R>(a1)};
                multiply_wide(fresh[m][n], wide, tokens[n][half]);
              }
            }
          }
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Fragment large, small;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int k = step * 16 + half * 8 + lane % 4 * 2 + i / 2;
              const float value = router_number(stage, block, k, first_expert + m * 16 + lane / 4 + i % 2 * 8);
              const float part = round_to_tf32(value);
              large[i] = __float_as_uint(part);
              small[i] = __float_as_uint(round_to_tf32(value - part));
            }
#pragma unroll
            for (int n = 0; n < kRows; ++n) {
              multiply_wide(fresh[m][n], small, tokens[n][half]);
              multiply_wide(fresh[m][n], large, tokens[n][half]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kExpertTiles; ++m)
#pragma unroll
      for (int n = 0; n < kRows; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] += fresh[m][n][i];
  }

  __device__ __forceinline__ static void multiply_wide(float (&d)[4], const Fragment& experts, uint32_t tokens) {
    const uint32_t wide[2] = {low_number<X>(tokens), high_number<X>(tokens)};
    mma_16x8x8_tf32(d, experts, wide);
  }

  // The gate's products, and squares: a thread has 8 numbers of K of every kThreads / kRowPieces-th token.
  static constexpr int kRowPieces = kBlock / 8, kRowParts = (kTile * kRowPieces + kThreads - 1) / kThreads;
  static_assert(32 % kRowPieces == 0, "the pieces of a token are in one warp");

  __device__ __forceinline__ void weigh(float (&gate_sums)[kRowParts], float (&squares)[kRowParts],
                                        const unsigned char* stage, int block, int steps) const {
    const int piece = threadIdx.x % kRowPieces;
    if (piece >= steps * 2) return;
#pragma unroll
    for (int part = 0; part < kRowParts; ++part) {
      const int token = (part * kThreads + threadIdx.x) / kRowPieces;
      if (token >= kTile) break;
      const X* const row = reinterpret_cast<const X*>(stage + kTokensAt + token * kTokenRow) + piece * 8;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float value = number(row[i]);
        if constexpr (kGated)
          gate_sums[part] = fmaf(value, number(gate[block * kBlock + piece * 8 + i]), gate_sums[part]);
        if constexpr (kNormed) squares[part] = fmaf(value, value, squares[part]);
      }
    }
  }

  __device__ __forceinline__ void store_row_sums(float* out, const float (&row_sums)[kRowParts],
                                                 int first_token) const {
#pragma unroll
    for (int part = 0; part < kRowParts; ++part) {
      float sum = row_sums[part];
#pragma unroll
      for (int distance = 1; distance < kRowPieces; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      const int token = (part * kThreads + threadIdx.x) / kRowPieces;
      if (threadIdx.x % kRowPieces == 0 && token < kTile && first_token + token < count.of(kTokens)) {
        out[int64_t(token) * kStride] = sum;
      }
    }
  }
};

}  // namespace jmm
