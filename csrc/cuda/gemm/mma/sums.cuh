// What the multipliers of the mma.sync kernel do with the sums of a work tile, whatever their rows are made of.
#pragma once

#include "gemm/mma/storage.cuh"

namespace jmm {

template <int kUnits, int kTokenFragments>
__device__ __forceinline__ void clear_sums(float (&sums)[kUnits][kSubTiles][kTokenFragments][4]) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u)
#pragma unroll
    for (int w = 0; w < kSubTiles; ++w)
#pragma unroll
      for (int t = 0; t < kTokenFragments; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[u][w][t][i] = 0.0f;
}

// Of a unit, sums += (codes - zero * row_sums) * scale, with the scales in row `row` of a stage; of zero points, what
// the fragments have not taken from the codes already. A lane has columns `column` + 8 j, j = 0..7.
template <class Shape, int kActive, class Sum, int kSums, int kCodes, int kRows>
__device__ __forceinline__ void add_scaled(float (&sums)[kSubTiles][kSums][4], const Sum (&codes)[kSubTiles][kCodes][4],
                                           const Sum (&row_sums)[kRows][4], uint32_t stage, int row, int column) {
  using Storage = MmaStorage<Shape>;
  using Codes = typename Shape::Codes;
  using Zeros = typename Shape::Zeros;
  typename Shape::Scales scales;
  scales.load(stage + Storage::kScalesAt + row * Storage::kUnitScaleBytes + column * 8 * Shape::Scales::kBytes);
  Zeros zeros;
  zeros.load(stage + Storage::kZerosAt + row * Zeros::kUnitBytes, column);
#pragma unroll
  for (int w = 0; w < kSubTiles; ++w) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {  // columns g and g + 8 of the sub-tile
      const float scale = scales[2 * w + b];
      const float zero = Codes::kFactor * (zeros[2 * w + b] - offset_of_codes<Codes, typename Shape::T>());
#pragma unroll
      for (int t = 0; t < kActive; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // tokens 2t and 2t + 1
          float sum = static_cast<float>(codes[w][t][2 * b + i]);
          if constexpr (Shape::kTokenSums) sum -= zero * static_cast<float>(row_sums[t][i]);
          sums[w][t][2 * b + i] += sum * scale;
        }
      }
    }
  }
}

// The factors of codes and scales, and the global scales, once per work tile.
template <class Shape>
__device__ __forceinline__ void apply_factors(typename Shape::Sums& sums,
                                              const float (&global_scales)[Shape::Tile::kUnits]) {
  constexpr float kFactor = Shape::Codes::kFactor * Shape::Scales::kFactor;
  if constexpr (Shape::Problem::kGlobalScales || kFactor != 1.0f) {
#pragma unroll
    for (int u = 0; u < Shape::Tile::kUnits; ++u)
#pragma unroll
      for (int w = 0; w < kSubTiles; ++w)
#pragma unroll
        for (int t = 0; t < Shape::kTokenFragments; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[u][w][t][i] *= global_scales[u] * (1.0f / kFactor);
  }
}

}  // namespace jmm
