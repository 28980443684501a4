// Stages to results: the consumer warpgroups of the wgmma kernel.
//
// While the tensor cores work on one batch of steps, the warps load and dequantise the next, across the boundary of
// k-blocks too (docs/kernels.md, "The wgmma kernel"):
//
//   wait full(s)
//   ld.shared            [L1]              [L0']                [L1']
//   wgmma         [ batch 0 in flight ][ batch 1 in flight ]  wait  [ batch 0' in flight ]
//   dequantise           [  D1  ]          [  D0'  ]        release(s)     [  D1'  ]
//                                          ^ waits for full(s + 1)
#pragma once

#include "gemm/named_barriers.cuh"
#include "gemm/wgmma/bytes.cuh"
#include "ptx/hopper.cuh"
#include "ptx/matrices.cuh"
#include "ptx/memory.cuh"
#include "ptx/synchronization.cuh"
#include "token_tiles.cuh"

namespace jmm {

// Gemm is the kernel.
template <class Gemm>
struct WgmmaConsumer {
  using Shape = typename Gemm::Shape;
  using T = typename Shape::T;
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using Epilogue = typename Shape::Epilogue;
  using KBlocks = typename Shape::KBlocks;
  using Storage = WgmmaStorage<Shape>;
  using Shared = WgmmaShared<Shape>;
  using Record = typename Storage::Record;
  using Weights = typename Gemm::Weights;
  using Lane = WgmmaLane<Shape>;
  using Stage = Cursor<Tile::kStages>;

  __device__ __forceinline__ static void acquire(const Shared& shared, const Stage& stage) {
    mbarrier_wait(shared.full(stage.at), stage.parity);
    fence_async_proxy();
  }
  // `loaded` has bits of all that was loaded from the stage and may not be in use yet. An arrival does not wait for
  // loads, and the bulk copy that it lets go would overtake one that stands in a long queue: the barrier's address
  // depends on the value (docs/kernels.md, "The wgmma kernel").
  __device__ __forceinline__ static void release(const Shared& shared, int stage, const Lane& lane, uint32_t loaded) {
    __syncwarp();
    if (lane.lane == 0) mbarrier_arrive(shared.empty(stage) + (loaded & lane.zero));
  }

  static constexpr int kStepsPerGroup = Problem::kGroup / kStepRows;

  // Whether the k-block that a warpgroup takes after this one belongs to another group, or to another work tile.
  __device__ __forceinline__ static bool ends_group(int k_block) {
    const int next = k_block + Tile::kWarpgroupsK;
    return next >= KBlocks::kCount ||
           k_block * Tile::kBlockK / Problem::kGroup != next * Tile::kBlockK / Problem::kGroup;
  }

  // Adds the sums of the warpgroups that share K, in their order. True for the one that has the total.
  template <int kSums>
  __device__ __forceinline__ static bool add_shares(const Shared& shared, const Lane& lane,
                                                    float (&sums)[Tile::kSubTiles][kSums]) {
    constexpr int kConsumers = 128 * Tile::kWarpgroups;
    float* partials = reinterpret_cast<float*>(shared.bytes + Storage::kPartialsAt) +
                      lane.warpgroup * (Shape::kThreadSums * 128) + lane.warp * 32 + lane.lane;
    if (lane.share > 0) {
      named_barrier_sync<kPartialsRead>(kConsumers);
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          partials[((lane.share - 1) * Tile::kWarpgroupsN * Shape::kThreadSums + j * kSums + i) * 128] = sums[j][i];
        }
      named_barrier_arrive<kPartialsWritten>(kConsumers);
      return false;
    }
    named_barrier_arrive<kPartialsRead>(kConsumers);  // those of the work tile before
    named_barrier_sync<kPartialsWritten>(kConsumers);
#pragma unroll
    for (int share = 1; share < Tile::kWarpgroupsK; ++share)
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          sums[j][i] += partials[((share - 1) * Tile::kWarpgroupsN * Shape::kThreadSums + j * kSums + i) * 128];
        }
    return true;
  }

  template <int kN>
  __device__ __forceinline__ static void store(const Gemm& gemm, const Record& record, const Lane& lane,
                                               const float (&sums)[Tile::kSubTiles][kN / 2]) {
    const typename Shape::ExpertIndex expert = record.expert;
    float factors[Shape::kHalves];  // of this lane's sums
#pragma unroll
    for (int h = 0; h < Shape::kHalves; ++h) {
      factors[h] = Weights::kResidualScale;
      if constexpr (Shape::kScalesSums) {
        const ExpertArray<Problem, float> scales(gemm.operands.global_scales, gemm.operands.shared_global_scales,
                                                 record.expert);
        factors[h] *= scales.elements[typename Shape::ExpertIndex(scales.expert) * (Problem::kUnits) +
                                      Shape::packed_unit(record.column_tile, lane.unit(h))];
      }
    }
    const int first_column = record.column_tile * Shape::kHalfUnits * kUnitColumns + lane.unit(0) * kUnitColumns +
                             lane.word() * 16 + lane.lane / 4;
    if constexpr (kPacksFour<Epilogue>) {
      store_fours<kN>(gemm, record, lane, first_column, factors[0], sums);
    } else if constexpr (kExchangesRows<Epilogue>) {
      store_words<kN>(gemm, record, lane, first_column, factors, sums);
    } else {
      store_values<kN>(gemm, record, lane, first_column, factors, sums);
    }
  }

  // Results of 16 bits: a lane has a column of two rows, and after a transposition two columns of one row. The four
  // lanes of a row then exchange such words, so that each stores up to eight columns side by side, and stores fill
  // sectors. Columns that take turns are not side by side, and the first product's smaller tiles were not measured.
  static constexpr bool kSideBySide = !Shape::kTakesTurns && (!Epilogue::kGated || Tile::kTokens > 128);
  static constexpr int kStoredWords = !kSideBySide ? 1 : Shape::kWarpSubTiles == 1 ? 2 : 4;
  template <int kN>
  __device__ __forceinline__ static void store_words(const Gemm& gemm, const Record& record, const Lane& lane,
                                                     int first_column, const float (&factors)[Shape::kHalves],
                                                     const float (&sums)[Tile::kSubTiles][kN / 2]) {
    const typename Shape::ExpertIndex expert = record.expert;
    const float up_factor = factors[Shape::kHalves - 1];
    const int of_row = lane.lane % 4;  // this lane among those of a row
    const int first_of_row = first_column + (lane.word_of_pair() - lane.word()) * 16 - lane.lane / 4 +
                             (kStoredWords == 1   ? of_row * 2
                              : kStoredWords == 2 ? of_row % 2 * 8 + of_row / 2 * 4
                                                  : of_row * 8);
#pragma unroll
    for (int t = 0; t < kN / 8; ++t) {
      const int slot = record.slots[8 * t + lane.lane / 4], row = 8 * t + lane.lane % 4 * 2;
      const float2 row_factors{record.factors[0][row], record.factors[0][row + 1]};
#pragma unroll
      for (int piece = 0; piece < 2 * Shape::kWarpSubTiles; piece += kStoredWords) {  // of eight columns
        uint32_t words[kStoredWords];
#pragma unroll
        for (int i = 0; i < kStoredWords; ++i) {
          const int p = (piece + i) / 2, b = (piece + i) % 2, s = 4 * t + 2 * b, column = 16 * p + 8 * b;
          const float (&up)[kN / 2] = sums[Epilogue::kGated ? Tile::kSubTiles - Shape::kWarpSubTiles + p : p];
          words[i] = transpose_matrix(gemm.epilogue.of_two_rows(
              expert, row_factors, first_column + column, float2{sums[p][s] * factors[0], sums[p][s + 1] * factors[0]},
              float2{up[s] * up_factor, up[s + 1] * up_factor}));
        }
        exchange_words(words, of_row);
        store_columns<Epilogue::kColumns>(gemm.epilogue.out, slot, first_of_row + 8 * piece, words);
      }
    }
  }

  // Each of four lanes has a word of each of kWords pieces. Afterwards, a lane has words of the piece of its number
  // (modulo kWords), in the order of the lanes: all of four, or those of its half of the lanes.
  template <int kWords>
  __device__ __forceinline__ static void exchange_words(uint32_t (&words)[kWords], int of_row) {
#pragma unroll
    for (int distance = 1; distance < kWords; distance *= 2) {
      const bool keeps_upper = of_row & distance;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (i & distance) continue;
        uint32_t &lower = words[i], &upper = words[i + distance];
        const uint32_t theirs = __shfl_xor_sync(~0u, keeps_upper ? lower : upper, distance);
        (keeps_upper ? lower : upper) = theirs;
      }
    }
  }

  template <int kN>
  __device__ __forceinline__ static void store_values(const Gemm& gemm, const Record& record, const Lane& lane,
                                                      int first_column, const float (&factors)[Shape::kHalves],
                                                      const float (&sums)[Tile::kSubTiles][kN / 2]) {
    const typename Shape::ExpertIndex expert = record.expert;
#pragma unroll
    for (int t = 0; t < kN / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * t + lane.lane % 4 * 2 + i;
        const int slot = record.slots[row];
        if (kQuantizes<Epilogue> && slot < 0) continue;
        const float factor = record.factors[0][row];
#pragma unroll
        for (int p = 0; p < Shape::kWarpSubTiles; ++p) {
          const float (&up)[kN / 2] = sums[Epilogue::kGated ? Tile::kSubTiles - Shape::kWarpSubTiles + p : p];
          const float up_factor = factors[Shape::kHalves - 1];
          const int column = first_column + 16 * p;
          if constexpr (kQuantizes<Epilogue>) {
            const int s = 4 * t + i;
            store_pair(gemm.epilogue, expert, slot, factor, column,
                       float2{sums[p][s] * factors[0], sums[p][s + 2] * factors[0]},
                       float2{up[s] * up_factor, up[s + 2] * up_factor}, pair_biases(gemm.epilogue, expert, column));
          } else {
#pragma unroll
            for (int b = 0; b < 2; ++b) {
              const int s = 4 * t + 2 * b + i, of_sum = column + 8 * b;
              if (slot < 0) continue;
              gemm.epilogue.store(expert, slot, factor, of_sum, sums[p][s] * factors[0],
                                  Epilogue::kGated ? up[s] * up_factor : 0.0f, gemm.epilogue.biases(expert, of_sum));
            }
          }
        }
      }
    }
  }

  // Four columns of a row at a time. A warp with one sub-tile has two of them in a lane: lanes of neighbouring columns
  // exchange, and each has four of one of their two rows.
  template <int kN>
  __device__ __forceinline__ static void store_fours(const Gemm& gemm, const Record& record, const Lane& lane,
                                                     int first_column, float factor,
                                                     const float (&sums)[Tile::kSubTiles][kN / 2]) {
    constexpr bool kPairs = Epilogue::kPairs;
    static_assert(kPairs == (Shape::kWarpSubTiles == 1), "two sub-tiles have four columns of a row");
    const typename Shape::ExpertIndex expert = record.expert;
    const bool odd = lane.lane / 4 % 2;
    const int column = first_column - (kPairs ? odd : 0);
    uint2* const vectors = gemm.epilogue.vectors_from(column);
#pragma unroll
    for (int t = 0; t < kN / 8; ++t) {
#pragma unroll
      for (int i = 0; i < (kPairs ? 1 : 2); ++i) {
        const int row = 8 * t + lane.lane % 4 * 2 + (kPairs ? odd : i);
        const int slot = record.slots[row];
        float fours[kPairs ? 1 : Shape::kWarpSubTiles / 2][4];
        if constexpr (kPairs) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const float of_rows[2] = {sums[0][4 * t + 2 * b], sums[0][4 * t + 2 * b + 1]};
            const float theirs = __shfl_xor_sync(~0u, odd ? of_rows[0] : of_rows[1], 4);
            fours[0][2 * b] = odd ? theirs : of_rows[0], fours[0][2 * b + 1] = odd ? of_rows[1] : theirs;
          }
        } else {
#pragma unroll
          for (int p = 0; p < Shape::kWarpSubTiles; ++p) {
#pragma unroll
            for (int b = 0; b < 2; ++b) fours[p / 2][p % 2 * 2 + b] = sums[p][4 * t + 2 * b + i];
          }
        }
        const float weight = record.factors[0][row];
        gemm.epilogue.template store_four<0>(expert, slot, factor, weight, vectors, column, fours[0]);
        if constexpr (Shape::kWarpSubTiles == 4) {
          gemm.epilogue.template store_four<32>(expert, slot, factor, weight, vectors, column, fours[1]);
        }
      }
    }
  }

  template <int kN>
  __device__ __forceinline__ static void multiply_tile(const Gemm& gemm, const Shared& shared, const Record& record,
                                                       const Lane& lane, Stage stage) {
    float sums[Tile::kSubTiles][kN / 2];  // of the tile
    if constexpr (kIsByte<T>) {
      WgmmaByteProduct<Gemm, WgmmaConsumer>::template run<kN>(gemm, shared, record, lane, stage, sums);
      WgmmaByteResults<Gemm>::template store<kN>(gemm, record, lane, sums);
    } else if (sum_tile<kN>(gemm, shared, record, lane, stage, sums)) {
      store<kN>(gemm, record, lane, sums);
    }
  }

  // An instruction has up to 256 columns: more are two instructions on the same fragments.
  template <int kN>
  __device__ __forceinline__ static void multiply(float (&sums)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                                  int accumulate) {
    if constexpr (kN <= 256) {
      Wgmma<T, kN>::run(sums, a, b, accumulate);
    } else {
      constexpr int kHalf = kN / 2;
      static_assert(kHalf % 8 == 0, "halves are whole groups of rows");
      Wgmma<T, kHalf>::run(reinterpret_cast<float (&)[kHalf / 2]>(sums[0]), a, b, accumulate);
      Wgmma<T, kHalf>::run(reinterpret_cast<float (&)[kHalf / 2]>(sums[kHalf / 2]), a, b + kHalf * 128 / 16,
                           accumulate);
    }
  }

  // True for the warpgroups that have the sums of the tile.
  template <int kN>
  __device__ __forceinline__ static bool sum_tile(const Gemm& gemm, const Shared& shared, const Record& record,
                                                  const Lane& lane, Stage stage,
                                                  float (&sums)[Tile::kSubTiles][kN / 2]) {
    float group_sums[Shape::kTwoSums ? Tile::kSubTiles : 1][kN / 2];  // of the group, without its scales
    typename Weights::Fragments a[2];                                 // weights: being made, and in use
    typename Weights::Words words;
    typename Weights::Scaling scaling;
#pragma unroll
    for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        sums[j][i] = 0.0f;
        if constexpr (Shape::kTwoSums) group_sums[j][i] = 0.0f;
      }

    if constexpr (Tile::kWarpgroupsK > 1) {
      for (int i = 0; i < lane.share; ++i) stage.advance();
    }
    // The first batch.
    scaling.begin(gemm.operands, record.expert);
    acquire(shared, stage);
    Weights::load(words, scaling, shared.weights(stage.at), 0, lane);
    Weights::make(a[0], words, scaling, 0);
    bool fresh = true;  // the next product begins a sum
#pragma unroll 1
    for (int k_block = Tile::kWarpgroupsK > 1 ? lane.share : 0; k_block < KBlocks::kCount;
         k_block += Tile::kWarpgroupsK) {
      const Stage here = stage;
      const uint32_t weights = shared.weights(here.at);
      const WgmmaRows tokens(shared.tokens(here.at));
      stage.template advance<Tile::kWarpgroupsK>();
      uint32_t loaded = 0;  // words and scales of weights have become fragments before their product; factors have not
#pragma unroll
      for (int batch = 0; batch < Weights::kBatches; ++batch) {
        // Load the next batch, unless it is in the next stage.
        if (batch + 1 < Weights::kBatches) Weights::load(words, scaling, weights, batch + 1, lane);
        // Multiply this batch.
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < Weights::kBatch; ++s) {
          const int step = batch * Weights::kBatch + s;
          const uint64_t b = tokens.at(step / 4 * Storage::kSlabBytes + step % 4 * 32);
          const bool begins = Shape::kTwoSums && KBlocks::kHoldGroups ? step % kStepsPerGroup == 0 : step == 0 && fresh;
#pragma unroll
          for (int j = 0; j < Tile::kSubTiles; ++j) {
            multiply<kN>(Shape::kTwoSums ? group_sums[Shape::kTwoSums ? j : 0] : sums[j], a[batch % 2][s][j], b,
                         !begins);
          }
        }
        wgmma_commit();
        fresh = false;
        wgmma_wait<1>();  // the other half of `a` is free
        // Dequantise the next batch.
        if (batch + 1 < Weights::kBatches) {
          Weights::make(a[(batch + 1) % 2], words, scaling, batch + 1);
        } else if (k_block + Tile::kWarpgroupsK < KBlocks::kCount) {
          acquire(shared, stage);
          Weights::load(words, scaling, shared.weights(stage.at), 0, lane);
          Weights::make(a[0], words, scaling, 0);
        }
        // Scale the sums of a group that ends.
        if constexpr (!Tile::kScalesWeights) {
          const int end = (batch + 1) * Weights::kBatch;  // in steps
          if (KBlocks::kHoldGroups ? end % kStepsPerGroup == 0 : end == KBlocks::kSteps && ends_group(k_block)) {
            const typename Weights::Factors factors(weights, (end - 1) / KBlocks::kStepsPerScale, lane);
            wgmma_wait<0>();
            factors.close(sums, group_sums);
            loaded = factors.bits();
            fresh = true;
          }
        }
      }
      wgmma_wait<0>();
      release(shared, here.at, lane, loaded);
    }
    if constexpr (Tile::kWarpgroupsK > 1) return add_shares(shared, lane, sums);
    return true;
  }

  // Token tiles with few rows multiply only so many: the least that a tile's counts have.
  __device__ __forceinline__ static constexpr int next_rows(int rows) {
    do rows += 8;
    while (rows < Tile::kTokens && !(Tile::kRowCounts >> (rows / 8 - 1) & 1));
    return rows;
  }
  template <int kRows>
  __device__ __forceinline__ static void multiply_rows(const Gemm& gemm, int rows, const Shared& shared,
                                                       const Record& record, const Lane& lane, Stage stage) {
    if constexpr (kRows == Tile::kTokens) {
      multiply_tile<kRows>(gemm, shared, record, lane, stage);
    } else {
      if (rows <= kRows) return multiply_tile<kRows>(gemm, shared, record, lane, stage);
      multiply_rows<next_rows(kRows)>(gemm, rows, shared, record, lane, stage);
    }
  }

  __device__ __forceinline__ static void run(const Gemm& gemm, const Shared& shared) {
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // known to be the same for the whole warp
    const Lane lane{warpgroup / Tile::kWarpgroupsN, warpgroup % Tile::kWarpgroupsN, int(threadIdx.x / 32 % 4),
                    int(threadIdx.x % 32), opaque_zero()};
    Stage stage;
    Cursor<Storage::kRecords> next;
#pragma unroll 1
    for (;; next.advance()) {
      mbarrier_wait(shared.record_full(next.at), next.parity);
      const Record& record = shared.record(next.at);
      if (record.expert < 0) break;
      const int rows = max(max(record.rows[0], record.rows[1]), max(record.rows[2], record.rows[3]));
      multiply_rows<next_rows(0)>(gemm, rows, shared, record, lane, stage);
      stage.template advance<KBlocks::kCount + zero_stages<Shape>()>();
      __syncwarp();
      if (lane.lane == 0) mbarrier_arrive(shared.record_empty(next.at));
    }
  }
};

}  // namespace jmm
