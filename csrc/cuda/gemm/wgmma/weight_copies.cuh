// Global to shared memory: how packed weights, scales and zero points reach a stage of the wgmma kernel.
#pragma once

#include "gemm/wgmma/storage.cuh"
#include "ptx/hopper.cuh"

namespace jmm {

// The weights of a stage: the k-block's rows of the work tile's columns.
template <class Shape>
struct WgmmaWeightCopies {
  using Problem = typename Shape::Problem;
  using Tile = typename Shape::Tile;
  using KBlocks = typename Shape::KBlocks;
  using Packed = typename Shape::Packed;
  using Scales = typename Shape::Scales;
  using Zeros = typename Shape::Zeros;
  using Storage = WgmmaStorage<Shape>;
  static constexpr int kStoredZeroBytes = Zeros::kStored ? Zeros::kUnitBytes : 16;  // of a type that is unused if none

  // What a stage has of one operand: kRows rows of kUnitBytes for each unit, of an expert's kRowsOfExpert. The units of
  // a half follow each other in memory as in the stage: a run. The runs of a k-block go to the four warps by turns.
  template <int kUnitBytes, int kRowsOfExpert, int kRows>
  struct Runs {
    static constexpr int kRowBytes = Problem::kUnits * kUnitBytes;
    static constexpr int kRuns = kRows * Shape::kHalves, kRunBytes = Shape::kHalfUnits * kUnitBytes;
    static_assert(kRunBytes % 16 == 0, "whole pieces");

    const int warp;
    const unsigned char* const source;  // of the warp's first run, in an expert's first rows

    __device__ __forceinline__ Runs(const void* operand, int expert, int column_tile, int w)
        : warp(w),
          source(static_cast<const unsigned char*>(operand) +
                 (int64_t(expert) * kRowsOfExpert + w / Shape::kHalves) * kRowBytes +
                 Shape::packed_unit(column_tile, w % Shape::kHalves * Shape::kHalfUnits) * kUnitBytes) {}
    template <class Element>
    __device__ __forceinline__ Runs(const ExpertArray<Problem, Element>& array, int column_tile, int w)
        : Runs(array.elements, array.expert, column_tile, w) {}
    // The same rows, but as many of them as there are here.
    template <int kOtherRows>
    __device__ __forceinline__ explicit Runs(const Runs<kUnitBytes, kRowsOfExpert, kOtherRows>& other)
        : warp(other.warp), source(other.source) {}

    // One lane's: copies the warp's runs of the rows from `row` on, and has the barrier wait for them.
    __device__ __forceinline__ void copy(uint32_t target, int row, uint32_t barrier, uint64_t policy) const {
      const int runs = runs_of_warp();
      if (kRuns >= 4 || runs > 0) mbarrier_expect_bytes(barrier, runs * kRunBytes);
#pragma unroll
      for (int i = 0; i < (kRuns + 3) / 4; ++i) {
        if (kRuns % 4 == 0 || i < runs) {
          copy_bulk<kRunBytes>(target + (warp + 4 * i) * kRunBytes, run(row, i), barrier, policy);
        }
      }
    }
    // One lane's: has L2 fetch the same.
    __device__ __forceinline__ void fetch(int row) const {
      const int runs = runs_of_warp();
#pragma unroll
      for (int i = 0; i < (kRuns + 3) / 4; ++i) {
        if (kRuns % 4 == 0 || i < runs) fetch_bulk_to_l2<kRunBytes>(run(row, i));
      }
    }

   private:
    __device__ __forceinline__ int runs_of_warp() const { return (kRuns + 3 - warp) / 4; }
    __device__ __forceinline__ const unsigned char* run(int row, int i) const {
      return source + int64_t(row) * kRowBytes + i * (4 / Shape::kHalves) * kRowBytes;
    }
  };

  const Runs<Packed::kBytes, Problem::kK / kStepRows, KBlocks::kSteps> weights;
  const Runs<kUnitColumns * Scales::kBytes, Problem::kGroups, KBlocks::kScaleRows> scales;
  const Runs<kStoredZeroBytes, Problem::kGroups, KBlocks::kScaleRows> zeros;

  __device__ __forceinline__ WgmmaWeightCopies(const Operands<Problem>& operands, int expert, int column_tile, int warp)
      : weights(ExpertArray<Problem, int32_t>(operands.packed, operands.shared_packed, expert), column_tile, warp),
        scales(ExpertArray<Problem, unsigned char>(operands.scales, operands.shared_scales, expert), column_tile, warp),
        zeros(ExpertArray<Problem, unsigned char>(operands.zeros, operands.shared_zeros, expert), column_tile, warp) {}

  __device__ __forceinline__ void copy(uint32_t stage, int k_block, uint32_t barrier, uint64_t policy) const {
    const int group = first_group(k_block);
    weights.copy(stage, first_step(k_block), barrier, policy);
    scales.copy(stage + Storage::kScalesAt, group, barrier, policy);
    if constexpr (Zeros::kStored) zeros.copy(stage + Storage::kZerosAt, group, barrier, policy);
  }
  __device__ __forceinline__ void fetch(int k_block) const {
    const int group = first_group(k_block);
    weights.fetch(first_step(k_block));
    scales.fetch(group);
    if constexpr (Zeros::kStored) zeros.fetch(group);
  }

  // Scales of so many groups, from `group` on.
  template <int kCount>
  __device__ __forceinline__ void copy_scales(uint32_t target, int group, uint32_t barrier, uint64_t policy) const {
    const Runs<kUnitColumns * Scales::kBytes, Problem::kGroups, kCount> runs(scales);
    runs.copy(target, group, barrier, policy);
  }

 private:
  __device__ __forceinline__ static int first_step(int k_block) {
    const int step = k_block * KBlocks::kSteps;
    return KBlocks::kMissingRows > 0 ? min(step, Problem::kK / kStepRows - KBlocks::kSteps) : step;
  }
  __device__ __forceinline__ static int first_group(int k_block) {
    const int group = k_block * Tile::kBlockK / Problem::kGroup;
    return KBlocks::kMissingRows > 0 ? min(group, Problem::kGroups - KBlocks::kScaleRows) : group;
  }
};

}  // namespace jmm
