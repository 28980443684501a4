// Shared memory to float32 sums: dequantises and multiplies stages of the mma.sync kernel.
//
// One word of a lane is its A fragment of 16 columns by 16 of K (docs/kernels.md, "From words to fragments"):
//
//   31                      0                                              k = 2t, 2t+1    k = 2t+8, 2t+9
//   +--+--+--+--+--+--+--+--+   word      & 0x000F000F --> A0 = a0, a1    +---------------+---------------+
//   |d1|b1|c1|a1|d0|b0|c0|a0|   word >> 8 & 0x000F000F --> A1 = b0, b1    |   A0 = a0 a1  |   A2 = c0 c1  |  column g
//   +--+--+--+--+--+--+--+--+   word      & 0x00F000F0 --> A2 = c0, c1    |   A1 = b0 b1  |   A3 = d0 d1  |  column g +
//   8 lane 4 g + t, 4-bit codes   word >> 8 & 0x00F000F0 --> A3 = d0, d1    +---------------+---------------+
#pragma once

#include "gemm/mma/sums.cuh"
#include "ptx/matrices.cuh"
#include "ptx/numbers.cuh"

namespace jmm {

template <class Shape>
struct MmaMultiplier {
  using T = typename Shape::T;
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using KBlocks = typename Shape::KBlocks;
  using Packed = typename Shape::Packed;
  using Codes = typename Shape::Codes;
  using Storage = MmaStorage<Shape>;
  static constexpr int kTokenFragments = Shape::kTokenFragments;
  using Sums = typename Shape::Sums;

  Sums sums;                             // scaled, of the work tile
  Sums group_sums;                       // of codes, of the group
  float token_sums[kTokenFragments][4];  // of x alone, of the group
  const int lane;
  uint32_t token_offsets[KBlocks::kSteps];  // of this lane's ldmatrix row, for the first 8 tokens

  __device__ __forceinline__ explicit MmaMultiplier(int l) : lane(l) {
#pragma unroll
    for (int step = 0; step < KBlocks::kSteps; ++step) {
      token_offsets[step] = Storage::token_piece(lane % 8, step * 2 + lane / 8 % 2);
    }
  }

  __device__ __forceinline__ void begin_tile() {
    clear_sums(sums);
    clear_group_sums();
  }

  // Only the first `token_fragments` groups of 8 rows are multiplied; of one, `sides` groups of K side by side.
  __device__ __forceinline__ void multiply(int token_fragments, int sides, uint32_t stage, uint32_t tokens,
                                           bool closes_group, bool shortened) {
    if constexpr (Shape::kMostSides > 1) {
      if (sides > 1) return multiply<1, Shape::kMostSides>(stage, tokens, closes_group, shortened);
    }
    if constexpr (kTokenFragments >= 4) {
      if (token_fragments == 4) return multiply<4>(stage, tokens, closes_group, shortened);
    }
    if constexpr (kTokenFragments >= 3) {
      if (token_fragments == 3) return multiply<3>(stage, tokens, closes_group, shortened);
    }
    if constexpr (kTokenFragments >= 2) {
      if (token_fragments == 2) return multiply<2>(stage, tokens, closes_group, shortened);
    }
    multiply<1>(stage, tokens, closes_group, shortened);
  }

  // Adds up what two groups side by side have, once per work tile: lanes 4 g + t have columns 2t and 2t + 1.
  __device__ __forceinline__ void join_sides(int sides) {
    if constexpr (Shape::kMostSides > 1) {
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u)
#pragma unroll
        for (int w = 0; w < kSubTiles; ++w)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& sum = sums[u][w][0][i];
            if (sides > 1) sum += __shfl_xor_sync(~0u, sum, 2);
          }
    }
  }

 private:
  __device__ __forceinline__ void clear_group_sums() {
    clear_sums(group_sums);
#pragma unroll
    for (int t = 0; t < kTokenFragments; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) token_sums[t][i] = 0.0f;
    }
  }

  __device__ __forceinline__ static void multiply_into(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                       bool fresh) {
    if (fresh) {
      mma_16x8x16_fresh<T>(sums, a, b);
    } else {
      mma_16x8x16<T>(sums, a, b);
    }
  }

  // sums += (group_sums - zero * token_sums) * scale, for `sides` groups from `scale_row` on.
  template <int kActive, int kSides>
  __device__ __forceinline__ void close_groups(uint32_t stage, int scale_row, int sides = kSides) {
    const int column = lane / 4, side = lane % 4 / (4 / kSides);
    if (side >= sides) return;
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u) {
      const int row = (scale_row + side) * Tile::kUnits + u;
      add_scaled<Shape, kActive>(sums[u], group_sums[u], token_sums, stage, row, column);
    }
  }

  template <int kActive, int kSides = 1>
  __device__ __forceinline__ void multiply(uint32_t stage, uint32_t tokens, bool closes_group, bool shortened) {
    constexpr int kExponents[2] = {Codes::token_exponent(0), Codes::token_exponent(1)};  // of the halves of K
    constexpr uint32_t kOnes[2] = {paired_power<T>(-kExponents[0]), paired_power<T>(-kExponents[1])};
    const uint32_t ones[4] = {kOnes[0], kOnes[0], kOnes[1], kOnes[1]};  // that make up for them
    // Of the fragment's columns, each side has kColumns.
    constexpr int kColumns = 8 / kSides, kGroupSteps = KBlocks::kStepsPerScale, kSpan = kGroupSteps * kSides;
    uint32_t side_tokens[kGroupSteps][2];
    // Steps are unrolled in parts. Of a token's row a part has whole 128 bytes: pieces are swizzled alike in all of
    // them.
    constexpr int kPart = Shape::part_steps(kSpan), kLastSteps = Shape::kLastSteps % kPart;
    const int parts = shortened ? (Shape::kLastSteps + kPart - 1) / kPart : KBlocks::kSteps / kPart;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const uint32_t part_packed = stage + part * (kPart * Storage::kStepBytes);
      const uint32_t part_tokens = tokens + part * (kPart * kStepRows * 2);
      const int part_groups = part * (kPart / kGroupSteps);
#pragma unroll
      for (int step = 0; step < kPart; ++step) {
        if (step == kLastSteps && step > 0 && shortened && part == parts - 1) {
          if constexpr (KBlocks::kHoldGroups && kLastSteps % kSpan != 0) {  // the last one may be shorter
            constexpr int kFirst = kLastSteps / kSpan * kSides;
            close_groups<kActive, kSides>(stage, part_groups + kFirst,
                                          (kLastSteps + kGroupSteps - 1) / kGroupSteps - kFirst);
          }
          break;
        }
        const bool opens_group = KBlocks::kHoldGroups && step % kSpan == 0;
        // Load: the tokens' fragments.
        uint32_t b[kActive][2];
        if constexpr (kSides == 1) {
#pragma unroll
          for (int t = 0; t < kActive; ++t) {
            load_matrices_x2(b[t], part_tokens + token_offsets[step] + t * 8 * Tile::kBlockK * 2);
            if constexpr (kExponents[0] != 0) {
              b[t][0] = multiply_pairs<T>(b[t][0], paired_power<T>(kExponents[0]));
              b[t][1] = multiply_pairs<T>(b[t][1], paired_power<T>(kExponents[1]));
            }
          }
        } else {
          // One load has a step of each side, in columns of its own. Those of the other sides are multiplied by zero.
          const int side = step / kGroupSteps % kSides, within = step % kGroupSteps;
          if (side == 0) {
            const int row = lane % 8;
            load_matrices_x2(
                side_tokens[within],
                part_tokens +
                    Storage::token_piece(row % kColumns, (step + row / kColumns * kGroupSteps) * 2 + lane / 8 % 2));
          }
          const bool own = lane / 4 / kColumns == side;
          b[0][0] = multiply_pairs<T>(side_tokens[within][0], own ? paired_power<T>(kExponents[0]) : 0);
          b[0][1] = multiply_pairs<T>(side_tokens[within][1], own ? paired_power<T>(kExponents[1]) : 0);
        }
        if constexpr (Shape::kTokenSums) {
#pragma unroll
          for (int t = 0; t < kActive; ++t) multiply_into(token_sums[t], ones, b[t], opens_group);
        }
#pragma unroll
        for (int u = 0; u < Tile::kUnits; ++u) {
          // Load: the words of a unit.
          uint32_t words[Packed::kLaneWords];
          Packed::load_words(words, part_packed + step * Storage::kStepBytes + u * Packed::kBytes, lane);
#pragma unroll
          for (int w = 0; w < kSubTiles; ++w) {
            // Dequantise.
            uint32_t a[4];
            Codes::fragment(words + w * Packed::kSubTileWords, a);
            // Multiply.
#pragma unroll
            for (int t = 0; t < kActive; ++t) multiply_into(group_sums[u][w][t], a, b[t], opens_group);
          }
        }
        // Scale, where groups close inside the k-block.
        if constexpr (KBlocks::kHoldGroups) {
          if (step % kSpan == kSpan - 1) close_groups<kActive, kSides>(stage, part_groups + step / kSpan * kSides);
        }
      }
    }
    // Scale, where a group closes with the k-block.
    if constexpr (!KBlocks::kHoldGroups) {
      if (closes_group) {
        close_groups<kActive, 1>(stage, 0);
        clear_group_sums();
      }
    }
  }
};

}  // namespace jmm
