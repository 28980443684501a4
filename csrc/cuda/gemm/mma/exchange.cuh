// The end of a work tile of the mma.sync kernel: shares of K are added in a fixed order, sums go to the epilogue.
#pragma once

#include "epilogue.cuh"
#include "gemm/mma/loader.cuh"
#include "gemm/mma/storage.cuh"
#include "gemm/named_barriers.cuh"
#include "ptx/memory.cuh"
#include "ptx/synchronization.cuh"

namespace jmm {

// What the end of a work tile needs to know about its rows. Lane r holds row r.
template <class Shape>
struct MmaRows {
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;

  int expert;                         // -1 where the tile has nothing to do
  int slot;                           // -1 where the row is padding
  float factor;                       // of the row
  int token_fragments;                // groups of 8 rows that are not all padding
  int sides = 1;                      // groups of K that the MMA's columns have room for
  float global_scales[Tile::kUnits];  // of this warp's units
  // Of this lane's columns, if no warps exchange sums and there are biases.
  PairBiases biases[Shape::kOwnUnits][kSubTiles];

  __device__ __forceinline__ MmaRows(const Operands<Problem>& operands, const typename Shape::Epilogue& epilogue,
                                     const MmaLoader<Shape>& loader, int work_tile, int warp_n, int lane) {
    const typename Shape::Reader& token_tiles = loader.token_tiles;
    const int token_tile = work_tile / Shape::kColumnTiles;
    expert = Shape::kAsksTogether ? loader.expert : token_tiles.expert(token_tile);
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u) {
      global_scales[u] = 1.0f;
      if constexpr (Problem::kGlobalScales) {
        const int unit = Shape::first_unit(work_tile, warp_n) + u * Shape::kUnitStride;
        const ExpertArray<Problem, float> scales(operands.global_scales, operands.shared_global_scales, max(expert, 0));
        global_scales[u] = scales.elements[typename Shape::ExpertIndex(scales.expert) * Problem::kUnits + unit];
      }
    }
    if constexpr (Shape::Epilogue::kBias) {
      if (expert >= 0) load_biases(epilogue, work_tile, warp_n, lane);
    }
    if constexpr (Shape::kAsksTogether) {
      slot = loader.slot;
    } else {
      slot = lane < Tile::kTokens ? token_tiles.slot(token_tile, lane) : -1;
    }
    if constexpr (Shape::TokenTiles::kMayRepeat) slot = token_tiles.first_listed(slot, token_tile, lane);
    factor = slot >= 0 ? epilogue.factor(slot) : 0.0f;
    token_fragments = 1;
    if constexpr (Shape::kTokenFragments > 1) {  // rounded up from the last real row
      token_fragments = (32 + 7 - __clz(__ballot_sync(~0u, slot >= 0) | 1)) / 8;
    }
    if constexpr (Shape::kMostSides > 1) {
      const int token_rows = 32 - __clz(__ballot_sync(~0u, slot >= 0) | 1);
      sides = token_rows <= 8 / Shape::kMostSides ? Shape::kMostSides : 1;
    }
  }

 private:
  // They come from memory: at the end of the work tile their loads would have to be waited for, one after the other.
  __device__ __forceinline__ void load_biases(const typename Shape::Epilogue& epilogue, int work_tile, int warp_n,
                                              int lane) {
    const typename Shape::ExpertIndex index = expert;
    if constexpr (Shape::kExchanges) {
      constexpr int kColumns = Shape::kOutputUnits * kUnitColumns;
      fetch_biases<kColumns>(epilogue, index, work_tile % Shape::kColumnTiles * kColumns, lane);
    } else {
#pragma unroll
      for (int u = 0; u < Shape::kOwnUnits; ++u) {
#pragma unroll
        for (int w = 0; w < kSubTiles; ++w) {
          const int sub_tile = Shape::output_unit(warp_n, u) * kSubTiles + w;
          biases[u][w] = pair_biases(epilogue, index, Shape::column_of(work_tile, sub_tile, lane));
        }
      }
    }
  }
};

// The warps that share a part of K.
template <class Shape, int kPart = 0>
__device__ __forceinline__ void sync_part(int warp_k) {
  using Tile = typename Shape::Tile;
  if constexpr (Tile::kWarpsN == 1) {
    __syncwarp();
  } else if constexpr (Tile::kWarpsK == 1) {
    __syncthreads();
  } else if constexpr (kPart < Tile::kWarpsK) {
    if (warp_k == kPart) {
      named_barrier_sync<kTokensArrived + kPart>(Shape::kCopyLanes);
    } else {
      sync_part<Shape, kPart + 1>(warp_k);
    }
  }
}

template <class Shape>
struct MmaExchange {
  using Tile = typename Shape::Tile;
  using Epilogue = typename Shape::Epilogue;
  using Sums = typename Shape::Sums;
  using Rows = MmaRows<Shape>;
  static constexpr int kTokenFragments = Shape::kTokenFragments;

  // Adds the shares of K in a fixed order and hands each sum to the epilogue.
  __device__ __forceinline__ static void finish(const Epilogue& epilogue, unsigned char* shared_bytes, int work_tile,
                                                const Rows& rows, int warp, int warp_n, int warp_k, int lane,
                                                const Sums& sums) {
    if constexpr (!Shape::kExchanges) {
      if (rows.expert < 0) return;
#pragma unroll
      for (int t = 0; t < kTokenFragments; ++t) {
        const PairOfRows pair(rows, t, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (pair.slots[i] < 0) continue;
#pragma unroll
          for (int u = 0; u < Shape::kOwnUnits; ++u) {
#pragma unroll
            for (int w = 0; w < kSubTiles; ++w) {
              const float (&first)[4] = sums[u][w][t];
              const float (&second)[4] = sums[Epilogue::kGated ? 1 : u][w][t];
              const int sub_tile = Shape::output_unit(warp_n, u) * kSubTiles + w;
              pair.store(i, epilogue, rows.expert, Shape::column_of(work_tile, sub_tile, lane),
                         float2{first[i], first[i + 2]}, float2{second[i], second[i + 2]}, rows.biases[u][w]);
            }
          }
        }
      }
    } else {
      // Write: every warp its sums.
      float4* partials = reinterpret_cast<float4*>(shared_bytes + MmaStorage<Shape>::kPartialsAt);
      sync_sharers();  // the partials of the tile before have been read
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u) {
        const int unit = Shape::half_of(warp_n, u) * Shape::kOutputUnits + Shape::output_unit(warp_n, u);
#pragma unroll
        for (int w = 0; w < kSubTiles; ++w) {
#pragma unroll
          for (int t = 0; t < kTokenFragments; ++t) {
            const int fragment = (unit * kSubTiles + w) * kTokenFragments + t;
            const float (&s)[4] = sums[u][w][t];
            partials[(warp_k * Shape::kSumFragments + fragment) * 32 + lane] = float4{s[0], s[1], s[2], s[3]};
          }
        }
      }
      sync_sharers();
      if (rows.expert < 0) return;
      // Add and store: every warp of the cluster its fragments.
      constexpr int kOutputFragments = Shape::kSumFragments / Shape::kHalves;
      const uint32_t shares = smem_address(partials);
#pragma unroll 1
      for (int f = Shape::cta_of_cluster() * Tile::kWarps + warp; f < kOutputFragments;
           f += Tile::kCluster * Tile::kWarps) {
        const int column = Shape::column_of(work_tile, f / kTokenFragments, lane);
        const PairBiases biases = pair_biases(epilogue, typename Shape::ExpertIndex(rows.expert), column);
        const float4 first = add_shares(shares, f, lane);
        const float4 second = Epilogue::kGated ? add_shares(shares, f + kOutputFragments, lane) : float4{};
        const PairOfRows pair(rows, f % kTokenFragments, lane);
        if (pair.slots[0] >= 0) {
          pair.store(0, epilogue, rows.expert, column, float2{first.x, first.z}, float2{second.x, second.z}, biases);
        }
        if (pair.slots[1] >= 0) {
          pair.store(1, epilogue, rows.expert, column, float2{first.y, first.w}, float2{second.y, second.w}, biases);
        }
      }
    }
  }

 private:
  // Of a fragment's 8 rows, the even and the odd one that this lane has sums of.
  struct PairOfRows {
    int slots[2];
    float factors[2];

    __device__ __forceinline__ PairOfRows(const Rows& rows, int token_fragment, int lane) {
      const int row = token_fragment * 8 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        slots[i] = __shfl_sync(~0u, rows.slot, row + i);
        factors[i] = __shfl_sync(~0u, rows.factor, row + i);
      }
    }
    // Columns `column` and `column + 8` of one of them.
    __device__ __forceinline__ void store(int i, const Epilogue& epilogue, typename Shape::ExpertIndex expert,
                                          int column, float2 first, float2 second, const PairBiases& biases) const {
      store_pair(epilogue, expert, slots[i], factors[i], column, first, second, biases);
    }
  };

  // All threads that share the K of a work tile.
  __device__ __forceinline__ static void sync_sharers() {
    if constexpr (Tile::kCluster > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ static float4 add_shares(uint32_t partials, int fragment, int lane) {
    float4 sum;
#pragma unroll
    for (int cta = 0; cta < Tile::kCluster; ++cta) {
      const uint32_t theirs = Tile::kCluster > 1 ? shared_of_cta(partials, cta) : partials;
#pragma unroll
      for (int k = 0; k < Tile::kWarpsK; ++k) {
        const uint32_t at = theirs + ((k * Shape::kSumFragments + fragment) * 32 + lane) * 16;
        const float4 part = Tile::kCluster > 1 ? load_cluster16(at) : as_floats(load_shared16(at));
        if (cta + k == 0) {
          sum = part;
        } else {
          sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
      }
    }
    return sum;
  }
};

}  // namespace jmm
