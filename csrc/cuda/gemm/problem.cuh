// A grouped product: what Python states about it, its operands, and what both GEMM kernels derive.
#pragma once

#include "offsets.cuh"
#include "ptx/memory.cuh"
#include "weights/zeros.cuh"

namespace jmm {

// Packed tiles are 16 rows of K by 64 columns (docs/formats.md, "Marlin layout").
constexpr int kStepRows = 16;                              // of K: the depth of one tensor-core instruction
constexpr int kUnitColumns = 64;                           // of one packed tile
constexpr int kSubTileColumns = 16;                        // of a unit: the rows of an A fragment
constexpr int kSubTiles = kUnitColumns / kSubTileColumns;  // of a unit

// Facts: Problem of jax_marlin_moe/cuda/kernels/problem.py.
template <class Facts_>
struct Problem {
  using Facts = Facts_;
  using T = typename Facts::Element;  // of x
  using Code = typename Facts::Code;
  using Scale = typename Facts::Scale;                         // type of the scales
  using Zeros = typename Facts::Zeros;                         // kind of zero points
  static constexpr bool kGlobalScales = Facts::kGlobalScales;  // float32 factors of each 64 columns
  static constexpr int kK = Facts::kK, kN = Facts::kN;         // of the packed matrix
  static constexpr int kColumns = Facts::kColumns;             // that the products have: all, or those of a slice
  static constexpr int kExperts = Facts::kExperts;
  static constexpr int kSharedExperts = Facts::kSharedExperts;  // behind them, in arrays of their own
  static constexpr int kGroup = Facts::kGroup;                  // rows of K that share a scale; the last may be shorter
  static constexpr int kRowStride = Facts::kRowStride;          // elements from a row of x to the next
  static constexpr int kSlotsPerRow = Facts::kSlotsPerRow;      // slot s reads row s / kSlotsPerRow of x
  static constexpr bool kTransposed = Facts::kTransposed;       // whether rows of x have kN columns, and results kK
  // Whether a row's sums are added up in one order, however many rows its token tile has.
  static constexpr bool kInOrder = Facts::kInOrder;
  static constexpr int kPieceValues = 16 / sizeof(T);  // in 16 bytes of a row of x
  static constexpr int kUnits = kN / kUnitColumns;
  static constexpr int kGroups = (kK + kGroup - 1) / kGroup;
  using ExpertIndex = Index<int64_t(kExperts) * kN>;  // of a column among those of all experts
  using ScaleElement = typename ColumnScales<Scale, 8>::Element;
  using ZeroElement = typename ColumnZeros<Zeros, Code, Scale>::Element;
  static_assert((kTransposed ? kN : kK) <= kRowStride, "a row of x has all that is summed over");
  static_assert(kColumns <= (kTransposed ? kK : kN), "a slice of the columns");
};

// The arrays that a product reads. Those of a slice begin where its columns do.
template <class Problem>
struct Operands {
  const typename Problem::T* __restrict__ x;  // [rows, kRowStride], of which the first K columns count, or N
  const int32_t* __restrict__ packed;         // [experts, K / 16, N * bits / 2]
  const unsigned char* __restrict__ scales;   // [experts, groups, N] of ScaleElement, in Marlin order
  const unsigned char* __restrict__ zeros;    // [experts, groups, N] of ZeroElement, in Marlin order, if stored
  const float* __restrict__ global_scales;    // [experts, N / 64] if kGlobalScales
  // The same of shared experts, if there are any.
  const int32_t* __restrict__ shared_packed;
  const unsigned char* __restrict__ shared_scales;
  const unsigned char* __restrict__ shared_zeros;
  const float* __restrict__ shared_global_scales;
};

// An array and an expert's place in it: the first one, or, for shared experts, the second.
template <class Problem, class Element>
struct ExpertArray {
  const Element* elements;
  int expert;

  __device__ __forceinline__ ExpertArray(const Element* own, const Element* shared, int e) : elements(own), expert(e) {
    if constexpr (Problem::kSharedExperts > 0) {
      if (e >= Problem::kExperts) elements = shared, expert = e - Problem::kExperts;
    }
  }
};

// The codes of a packed tile.
template <class Code>
struct PackedTile {
  static constexpr int kSubTileWords = Code::kBits / 4;  // of a lane: eight codes
  static constexpr int kLaneBytes = kSubTiles * kSubTileWords * 4;
  static constexpr int kBytes = 32 * kLaneBytes, kWords = kBytes / 4;
  static_assert(kBytes == kStepRows * kUnitColumns * Code::kBits / 8, "one word is eight 4-bit codes");

  // Where its 16-byte piece `p` lies in a stage of the mma.sync kernels. A lane reads one piece per word of a sub-tile;
  // with two or four, the rows of 128 bytes have theirs exchanged in turn, so that eight lanes hit no bank twice.
  __device__ __forceinline__ static uint32_t piece_at(int p) {
    return (kSubTileWords == 1 ? p : p ^ (p / 8 % kSubTileWords)) * 16;
  }

  // A lane's words of a tile in such a stage.
  static constexpr int kLaneWords = kSubTiles * kSubTileWords;
  __device__ __forceinline__ static void load_words(uint32_t (&words)[kLaneWords], uint32_t tile, int lane) {
#pragma unroll
    for (int half = 0; half < kSubTileWords; ++half) {
      const uint4 four = load_shared16(tile + piece_at(lane * kSubTileWords + half));
      words[4 * half] = four.x, words[4 * half + 1] = four.y;
      words[4 * half + 2] = four.z, words[4 * half + 3] = four.w;
    }
  }
};

// K in k-blocks of kBlockK rows, and what of the groups each of them has.
template <class Problem, int kBlockK>
struct KBlocks {
  static constexpr int kCount = (Problem::kK + kBlockK - 1) / kBlockK;
  static constexpr int kMissingRows = kCount * kBlockK - Problem::kK;  // of the last one
  static constexpr int kSteps = kBlockK / kStepRows;
  static constexpr bool kHoldGroups = Problem::kGroup <= kBlockK;  // whole ones; else a k-block is part of one
  static constexpr int kScaleRows = kBlockK > Problem::kGroup ? kBlockK / Problem::kGroup : 1;
  static constexpr int kStepsPerScale = kSteps / kScaleRows;
};

// The columns of a product: a gated one has those of gate and as many of up, and stores the former.
template <class Problem, class TokenTiles, class Epilogue>
struct ProductColumns {
  static constexpr int kHalves = Epilogue::kGated ? 2 : 1;
  static constexpr int kCount = Problem::kColumns / kHalves;
  static constexpr int kUnits = kCount / kUnitColumns;
  static_assert(kCount == Epilogue::kColumns, "the epilogue has the product's columns");
  static_assert(kHalves == 1 || Problem::kColumns == Problem::kN, "a slice has no columns of gate and of up");
  static_assert(TokenTiles::kExperts == Problem::kExperts + Problem::kSharedExperts, "token tiles are of its experts");
};

}  // namespace jmm
