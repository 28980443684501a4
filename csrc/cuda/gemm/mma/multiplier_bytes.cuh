// Shared memory to float32 sums with rows of 8 bits: multiplies stages of the mma.sync kernel, 32 rows of K at a time
// (docs/kernels.md, "8-bit activations").
//
// A fragment is 16 columns by 32 of K, in four registers: a lane's words of a sub-tile in two neighbouring steps. Which
// byte stands for which row of K is the packed order's choice (weights/fragments_bytes.cuh), and the rows of x have
// theirs alike, so ldmatrix brings the B fragments as they lie. With 4-bit codes, lane 4 g + t:
//
//    bytes 4 t to 4 t + 3 of 32       bytes 16 + 4 t to 16 + 4 t + 3        a0, a1, c0, c1 of the first step and of the
//   +----------------------------+   +----------------------------+        second: multiplier.cuh has their place in
//   | A0 = a0 a1 | a0 a1         |   | A2 = c0 c1 | c0 c1         |        a word
//   | A1 = b0 b1 | b0 b1         |   | A3 = d0 d1 | d0 d1         |
//   +----------------------------+   +----------------------------+
//
// Sums of a k-block start from zero and are scaled, in float32, into those of the tile: the tensor cores may add e4m3
// products with fewer bits than float32 has, and integers are exact that far.
#pragma once

#include "gemm/mma/sums.cuh"
#include "ptx/matrices.cuh"

namespace jmm {

template <class Shape>
struct MmaByteMultiplier {
  using T = typename Shape::T;
  using Sum = typename T::Sum;
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using Packed = typename Shape::Packed;
  using Codes = typename Shape::Codes;
  using Zeros = typename Shape::Zeros;
  using Storage = MmaStorage<Shape>;
  using Sums = typename Shape::Sums;
  static constexpr int kTokenFragments = Shape::kTokenFragments;
  static constexpr int kFragments = Tile::kBlockK / 32;         // of a k-block
  static constexpr int kLastFragments = Shape::kLastSteps / 2;  // of the last one
  static constexpr uint32_t kOnes = kSame<T, Fp8> ? 0x38383838u : 0x01010101u;
  static_assert(Zeros::kWhole && !Problem::kGlobalScales, "zero points are whole, scales are those of groups");
  static_assert(Problem::kK % 32 == 0, "K is whole fragments");

  Sums sums;  // scaled, of the work tile
  const int lane;
  uint32_t token_offsets[kFragments];  // of this lane's ldmatrix row, for the first 8 tokens

  __device__ __forceinline__ explicit MmaByteMultiplier(int l) : lane(l) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) token_offsets[f] = Storage::token_piece(lane % 8, 2 * f + lane / 8 % 2);
  }

  __device__ __forceinline__ void begin_tile() { clear_sums(sums); }

  // As for `MmaMultiplier`, but that there is one side, and that any k-block closes.
  __device__ __forceinline__ void multiply(int token_fragments, int, uint32_t stage, uint32_t tokens, bool,
                                           bool shortened) {
    if constexpr (kTokenFragments >= 4) {
      if (token_fragments == 4) return multiply<4>(stage, tokens, shortened);
    }
    if constexpr (kTokenFragments >= 3) {
      if (token_fragments == 3) return multiply<3>(stage, tokens, shortened);
    }
    if constexpr (kTokenFragments >= 2) {
      if (token_fragments == 2) return multiply<2>(stage, tokens, shortened);
    }
    multiply<1>(stage, tokens, shortened);
  }

 private:
  __device__ __forceinline__ static void multiply_into(Sum (&part)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                       bool fresh) {
    if (fresh) part[0] = part[1] = part[2] = part[3] = 0;  // the compiler feeds the zero register, no instruction
    mma_16x8x32<T>(part, a, b);
  }

  template <int kActive>
  __device__ __forceinline__ void multiply(uint32_t stage, uint32_t tokens, bool shortened) {
    constexpr uint32_t kAllOnes[4] = {kOnes, kOnes, kOnes, kOnes};
    Sum part[Tile::kUnits][kSubTiles][kActive][4];  // of codes, of the k-block
    Sum row_sums[kActive][4];                       // of x alone
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      if (f == kLastFragments && shortened) break;
      // Load: the tokens' fragments.
      uint32_t b[kActive][2];
#pragma unroll
      for (int t = 0; t < kActive; ++t) {
        load_matrices_x2(b[t], tokens + token_offsets[f] + t * 8 * Tile::kBlockK);
        if constexpr (Shape::kTokenSums) multiply_into(row_sums[t], kAllOnes, b[t], f == 0);
      }
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u) {
        // Load: the words of a unit in two steps.
        const uint32_t packed = stage + 2 * f * Storage::kStepBytes + u * Packed::kBytes;
        uint32_t first[Packed::kLaneWords], second[Packed::kLaneWords];
        Packed::load_words(first, packed, lane);
        Packed::load_words(second, packed + Storage::kStepBytes, lane);
#pragma unroll
        for (int w = 0; w < kSubTiles; ++w) {
          uint32_t a[4];
          Codes::fragment(first + w * Packed::kSubTileWords, second + w * Packed::kSubTileWords, a);
#pragma unroll
          for (int t = 0; t < kActive; ++t) multiply_into(part[u][w][t], a, b[t], f == 0);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u) add_scaled<Shape, kActive>(sums[u], part[u], row_sums, stage, u, lane / 4);
  }
};

}  // namespace jmm
