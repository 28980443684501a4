// Grouped GEMM over packed experts on Hopper's wgmma, for 8 to 256 token rows per block.
//
// The weights are the A operand, from registers: Marlin's order makes a word of a lane its fragment of m64k16, warp by
// warp. The tokens are the B operand, from shared memory. One warpgroup of a block of threads copies: it walks the
// tiles ahead of the others, fills the ring of stages and leaves a note about each tile. The others multiply, side by
// side along the columns: each dequantises the next 16 rows of K while its products of the last 16 run. The grid is
// persistent, so the ring fills for the next tile while this one is stored.
//
// The scales multiply either the 16-bit weights (no second set of sums; one rounding of each weight, none where code
// and scale have few bits between them) or, exactly, the float32 sums of a group when it closes; Tile says which.
#pragma once

#include "epilogue.cuh"
#include "gemm/problem.cuh"
#include "ptx/hopper.cuh"
#include "token_tiles.cuh"
#include "weights/fragments_offset.cuh"
#include "weights/zeros.cuh"

namespace jmm {

// How the work is cut. A block of threads makes kTokens x (kWarpgroupsN * kSubTiles * 64 packed columns);
// kWarpgroupsK warpgroups take the chunks of K in turn.
// Facts: WgmmaTile of jax_marlin_moe/cuda/kernels/wgmma.py.
template <class Facts>
struct WgmmaTile {
  static constexpr int kTokens = Facts::kTokens;            // rows of a token tile
  static constexpr int kSubTiles = Facts::kSubTiles;        // 64-row products of a warpgroup: 1, 2 or 4
  static constexpr int kWarpgroupsN = Facts::kWarpgroupsN;  // that multiply, side by side along the columns
  static constexpr int kWarpgroupsK = Facts::kWarpgroupsK;  // that share K
  static constexpr int kBlockK = Facts::kBlockK;            // rows of K in one stage of the ring
  static constexpr int kStages = Facts::kStages;            // stages of the ring
  static constexpr int kCtasPerSm = Facts::kCtasPerSm;      // resident CTAs
  static constexpr int kCluster = 1;
  static constexpr bool kScalesWeights = Facts::kScalesWeights;
  static constexpr int kWarpgroups = kWarpgroupsN * kWarpgroupsK;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);  // one more copies
  // Registers of a thread, in eights: a CTA enters with an equal share each, and the threads that copy hand theirs on.
  static constexpr int kEntryRegisters = 65536 / (kCtasPerSm * kThreads) / 8 * 8;
  static constexpr int kProducerRegisters = Facts::kProducerRegisters;
  static constexpr int kConsumerRegisters = Facts::kConsumerRegisters;
  static constexpr int kOtherRegisters = Facts::kOtherRegisters;  // of a consumer, beside sums and weights
  static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0, "as setmaxnreg takes them");
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <= (kWarpgroups + 1) * kEntryRegisters,
                "the multiprocessor has them");
  static_assert(kTokens % 8 == 0 && kTokens <= 256, "columns of a wgmma");
  static_assert(kBlockK % 64 == 0, "rows of 128 bytes in shared memory");
  // A wait names a phase by its parity, which is enough for who has seen the phase before it complete: the chunks of a
  // stage belong to one warpgroup. (Between tiles all of them meet.)
  static_assert(kStages % kWarpgroupsK == 0, "warpgroups that share K read different stages");
};

template <class Problem, class Tile, class TokenTiles, class Epilogue>
class WgmmaGroupedGemm {
  using T = typename Problem::T;
  using Code = typename Problem::Code;
  using CodeFragments = OffsetFragments<Code, T>;
  using Zeros = ColumnZeros<typename Problem::Zeros, Code, typename Problem::Scale>;

  static constexpr int kTileK = 16, kUnit = 64;           // Marlin's tile
  static constexpr int kFragmentWords = Code::kBits / 4;  // of a lane, for one sub-tile
  static constexpr int kUnitBytes = kTileK * kUnit * Code::kBits / 8;
  static constexpr int kLaneBytes = kUnitBytes / 32;
  static constexpr bool kFloatZeros = !Zeros::kWhole;
  static_assert(Tile::kScalesWeights || (!kFloatZeros && !Problem::kGlobalScales),
                "a fraction of a zero point goes into weights that have their scale; sums are scaled group by group");

  // A gated tile holds gate units and then as many up units; gate and up of a column meet in one thread. Each warp of a
  // warpgroup multiplies kParts sub-tiles of either half.
  static constexpr int kHalves = Epilogue::kGated ? 2 : 1;
  static constexpr int kParts = Tile::kSubTiles / kHalves;
  using Scales = ColumnScales<typename Problem::Scale, 2 * kParts>;
  static constexpr int kHalfUnits = Tile::kWarpgroupsN * kParts;  // 4 warps x kParts sub-tiles are kParts units
  static constexpr int kTileUnits = kHalves * kHalfUnits;
  static constexpr int kColumns = Problem::kN / kHalves;
  static constexpr int kColumnTiles = kColumns / (kUnit * kHalfUnits);
  static_assert(Tile::kSubTiles % kHalves == 0, "gate and up come in pairs");
  static_assert(kColumns % (kUnit * kHalfUnits) == 0, "column tiles are whole");
  static_assert(kColumns == Epilogue::kColumns, "the epilogue has the product's columns");
  static_assert(TokenTiles::kExperts == Problem::kExperts, "token tiles are of the matrix's experts");
  static_assert(TokenTiles::kRows == 1 || TokenTiles::kRows == Tile::kTokens, "rows of a token tile");

  // The last chunk ends where K does: the rows that it has had from the chunk before meet zeros in place of tokens.
  static constexpr int kChunks = (Problem::kK + Tile::kBlockK - 1) / Tile::kBlockK;
  static constexpr int kRepeated = kChunks * Tile::kBlockK - Problem::kK;  // rows
  static constexpr int kSteps = Tile::kBlockK / kTileK;
  static constexpr int kGroups = (Problem::kK + Problem::kGroup - 1) / Problem::kGroup;
  // The sums of a group and those of the tile, unless there is one group or weights have their scale.
  static constexpr bool kTwoSums = !Tile::kScalesWeights && kGroups > 1;
  static constexpr int kScaleRows = Tile::kBlockK > Problem::kGroup ? Tile::kBlockK / Problem::kGroup : 1;
  static constexpr int kStepsPerScale = kSteps / kScaleRows;
  static_assert(Problem::kK >= Tile::kBlockK && Problem::kK % kTileK == 0, "K is chunks, of whole steps");
  static_assert(kChunks >= Tile::kWarpgroupsK, "every warpgroup has a chunk");
  static_assert(kGroups == 1 || Problem::kGroup % Tile::kBlockK == 0 ||
                    (Tile::kBlockK % Problem::kGroup == 0 && Problem::kK % Problem::kGroup == 0),
                "a chunk is part of one group, or whole groups");

  // A stage: tokens, one slab of 128-byte rows per 64 of K; weights, units side by side, step after step; scales; zero
  // points.
  static constexpr int kSlabBytes = Tile::kTokens * 128;
  static constexpr int kTokenBytes = Tile::kBlockK / 64 * kSlabBytes;
  static constexpr int kStepBytes = kTileUnits * kUnitBytes;
  static constexpr int kScaleBytes = kScaleRows * kTileUnits * kUnit * Scales::kBytes;
  static constexpr int kZeroBytes = kScaleRows * kTileUnits * Zeros::kUnitBytes;
  static constexpr int kScalesAt = kSteps * kStepBytes;
  static constexpr int kZerosAt = kScalesAt + kScaleBytes;
  static constexpr int kWeightBytes = kZerosAt + kZeroBytes;

  // What the multiplying warpgroups need to know about a tile.
  struct Note {
    int expert;                    // -1 after the last tile
    int column_tile;               // of the product
    int rows[4];                   // the tile's last real row + 1 is the largest of these
    int slots[Tile::kTokens];      // -1 where the row is padding
    float factors[Tile::kTokens];  // of the rows
  };
  static constexpr int kNotes = 2;

  static constexpr int kWeightsAt = Tile::kStages * kTokenBytes;
  static constexpr int kNotesAt = kWeightsAt + Tile::kStages * kWeightBytes;
  // Sums of all but the first of the warpgroups that share K: [warpgroup][sum][thread].
  static constexpr int kThreadSums = Tile::kSubTiles * Tile::kTokens / 2;
  static constexpr int kPartialsAt = kNotesAt + kNotes * int(sizeof(Note));
  static constexpr int kBarriersAt =
      kPartialsAt + (Tile::kWarpgroupsK - 1) * Tile::kWarpgroupsN * kThreadSums * 128 * 4;
  static constexpr int kBlocksAt = (kBarriersAt + 8 * 2 * (Tile::kStages + kNotes) + 15) / 16 * 16;
  static_assert(kWeightBytes % 16 == 0 && sizeof(Note) % 8 == 0, "stages and barriers stay aligned");
  static_assert(TokenTiles::kScratchBytes <= kNotesAt, "the ring lends its memory before it is filled");
  using Blocks = typename TokenTiles::template Reader<Tile::kThreads>;
  using ExpertIndex = typename Problem::ExpertIndex;

 public:
  // Of the 16-byte pieces of x.
  using RowOffset = Offset<((TokenTiles::kSlots - 1) / Problem::kSlotsPerRow + int64_t(1)) * (Problem::kRowStride / 8)>;
  static constexpr int kSharedBytes = kBlocksAt + TokenTiles::kSharedBytes;
  static constexpr int kThreads = Tile::kThreads, kCtasPerSm = Tile::kCtasPerSm, kCluster = Tile::kCluster;
  using ScaleElement = typename Problem::ScaleElement;
  using ZeroElement = typename Problem::ZeroElement;
  static constexpr int64_t kWorkTiles = int64_t(TokenTiles::kMaxTiles) * kColumnTiles;
  static constexpr int64_t kMaxCtas = (kWorkTiles > 0 ? kWorkTiles : 1) * kCluster;

  Operands<Problem> operands;
  TokenTiles token_tiles;
  Epilogue epilogue;

  __device__ void run(unsigned char* shared_bytes) const {
    const Shared shared(shared_bytes);
    if (threadIdx.x == 0) {
      for (int s = 0; s < Tile::kStages; ++s) {
        mbarrier_init(shared.full(s), 128);
        mbarrier_init(shared.empty(s), 4 * Tile::kWarpgroupsN);
      }
      for (int n = 0; n < kNotes; ++n) {
        mbarrier_init(shared.note_full(n), 128);
        mbarrier_init(shared.note_empty(n), 4 * Tile::kWarpgroups);
      }
    }
    if constexpr (TokenTiles::kNeedsPreviousKernel) wait_for_previous_kernel();
    allow_next_kernel();
    const Blocks blocks(token_tiles, shared_bytes + kBlocksAt, shared_bytes);
    fence_async_proxy();  // bulk copies see the barriers, and the ring that was lent
    __syncthreads();
    if (threadIdx.x >= 128 * Tile::kWarpgroups) {
      if constexpr (kMovesRegisters) setmaxnreg_dec<Tile::kProducerRegisters>();
      copy(shared, blocks, threadIdx.x - 128 * Tile::kWarpgroups);
    } else {
      if constexpr (kMovesRegisters) setmaxnreg_inc<Tile::kConsumerRegisters>();
      if constexpr (!TokenTiles::kNeedsPreviousKernel) wait_for_previous_kernel();
      multiply(shared);
    }
  }

 private:
  // Whether there is something to hand on.
  static constexpr bool kMovesRegisters =
      Tile::kEntryRegisters < 240 && Tile::kEntryRegisters > Tile::kProducerRegisters;

  struct Shared {
    unsigned char* const bytes;
    const uint32_t base;

    __device__ __forceinline__ explicit Shared(unsigned char* b) : bytes(b), base(smem_address(b)) {}
    __device__ __forceinline__ uint32_t tokens(int stage) const { return base + stage * kTokenBytes; }
    __device__ __forceinline__ uint32_t weights(int stage) const { return base + kWeightsAt + stage * kWeightBytes; }
    __device__ __forceinline__ Note& note(int n) const { return reinterpret_cast<Note*>(bytes + kNotesAt)[n]; }
    __device__ __forceinline__ uint32_t full(int stage) const { return base + kBarriersAt + 8 * stage; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(Tile::kStages + stage); }
    __device__ __forceinline__ uint32_t note_full(int n) const { return full(2 * Tile::kStages + n); }
    __device__ __forceinline__ uint32_t note_empty(int n) const { return full(2 * Tile::kStages + kNotes + n); }
  };

  // A position in a ring and the parity of its round.
  template <int kLength>
  struct Cursor {
    int at = 0;
    uint32_t parity = 0;
    template <int kPlaces = 1>
    __device__ __forceinline__ void advance() {
      at += kPlaces % kLength;
      parity ^= kPlaces / kLength & 1;
      if (at >= kLength) at -= kLength, parity ^= 1;
    }
  };

  // ---- The warpgroup that copies.

  static constexpr int kRowsOfThread = (Tile::kTokens + 127) / 128;  // of a note
  static constexpr int kPieces = Tile::kBlockK / 8;                  // 16-byte pieces of a token's row in a chunk
  static constexpr int kRowStep = 128 / kPieces;                     // rows that the warpgroup copies at once
  static constexpr int kCopiedRows = (Tile::kTokens + kRowStep - 1) / kRowStep;  // of a thread
  static_assert(kCopiedRows <= 32, "one bit each");
  static_assert(kRowStep % 8 == 0, "the rows of a thread are swizzled alike");

  __device__ __forceinline__ void copy(const Shared& shared, const Blocks& blocks, int thread) const {
    const int lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);  // known to be the same for the whole warp
    const bool elected = elect_lane();
    const uint64_t policy = evict_first_policy();
    const int tiles = blocks.count() * kColumnTiles;
    const int piece = thread % kPieces, first_row = thread / kPieces;
    const uint32_t first_target = piece / 8 * kSlabBytes + first_row * 128 + ((piece ^ first_row) % 8) * 16;
    Cursor<Tile::kStages> stage;
    Cursor<kNotes> note;

    // The next tile's expert and slots are fetched a tile ahead.
    int next_expert = -1, next_slots[kRowsOfThread];
    const auto fetch = [&](int tile) {
      next_expert = -1;
      if (tile >= tiles) return;
      const int block = tile / kColumnTiles;
      next_expert = blocks.expert(block);
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = thread + 128 * i;
        next_slots[i] = row < Tile::kTokens ? blocks.slot(block, row) : -1;
      }
    };
    fetch(blockIdx.x);

    constexpr int kPrefetched = Tile::kStages < kChunks ? Tile::kStages : kChunks;
    int prefetched = 0;  // chunks of the first tile whose weights are on their way before its tokens exist
    bool waited = TokenTiles::kNeedsPreviousKernel;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int expert = __shfl_sync(~0u, next_expert, 0);  // known to be uniform
      int slots[kRowsOfThread];
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) slots[i] = next_slots[i];
      fetch(tile + gridDim.x);
      if (expert < 0) continue;
      const int column_tile = tile % kColumnTiles;

      const Runs<kUnitBytes, Problem::kK / kTileK, kSteps> weight_runs(operands.packed, expert, column_tile, warp);
      const Runs<kUnit * Scales::kBytes, kGroups, kScaleRows> scale_runs(operands.scales, expert, column_tile, warp);
      const Runs<kStoredZeroBytes, kGroups, kScaleRows> zero_runs(operands.zeros, expert, column_tile, warp);
      const auto copy_weights = [&](int s, int chunk) {
        if (!elected) return;
        int step = chunk * kSteps, group = chunk * Tile::kBlockK / Problem::kGroup;
        if constexpr (kRepeated > 0) {
          step = min(step, Problem::kK / kTileK - kSteps);
          group = min(group, kGroups - kScaleRows);
        }
        weight_runs.copy(shared.weights(s), step, shared.full(s), policy);
        scale_runs.copy(shared.weights(s) + kScalesAt, group, shared.full(s), policy);
        if constexpr (Zeros::kStored) zero_runs.copy(shared.weights(s) + kZerosAt, group, shared.full(s), policy);
      };
      if (!waited) {
#pragma unroll 1
        for (; prefetched < kPrefetched; ++prefetched) copy_weights(prefetched, prefetched);
        wait_for_previous_kernel();
        waited = true;
      }

      mbarrier_wait(shared.note_empty(note.at), note.parity ^ 1);
      Note& notes = shared.note(note.at);
      int last = 0;
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = thread + 128 * i;
        if constexpr (TokenTiles::kMayRepeat) slots[i] = blocks.first_listed(slots[i], tile / kColumnTiles, row);
        const uint32_t real = __ballot_sync(~0u, slots[i] >= 0);
        if (real) last = 128 * i + 32 * warp + 32 - __clz(real);
        if (row < Tile::kTokens) {
          notes.slots[row] = slots[i];
          notes.factors[row] = slots[i] >= 0 ? epilogue.factor(slots[i]) : 0.0f;
        }
      }
      if (lane == 0) notes.rows[warp] = last;
      if (thread == 0) notes.expert = expert, notes.column_tile = column_tile;
      named_barrier_sync<kCopierBarrier>(128);
      RowOffset offsets[kCopiedRows];  // of the rows of x that this thread copies, in pieces
      uint32_t real = 0;
#pragma unroll
      for (int i = 0; i < kCopiedRows; ++i) {
        const int row = first_row + i * kRowStep;
        const int slot = row < Tile::kTokens ? notes.slots[row] : -1;
        offsets[i] = static_cast<RowOffset>(max(slot, 0) / Problem::kSlotsPerRow) * (Problem::kRowStride / 8) + piece;
        if (slot >= 0) real |= 1u << i;
      }
      mbarrier_arrive(shared.note_full(note.at));
      note.advance();

      const uint4* source = reinterpret_cast<const uint4*>(operands.x);
#pragma unroll 1
      for (int chunk = 0; chunk < kChunks; ++chunk, source += kPieces) {
        mbarrier_wait(shared.empty(stage.at), stage.parity ^ 1);
        if (prefetched > 0) {
          --prefetched;
        } else {
          copy_weights(stage.at, chunk);
        }
        // A row that does not exist is not copied: it meets the weights in a column of its own, never stored.
        const uint32_t target = shared.tokens(stage.at) + first_target;
        const bool repeats = kRepeated > 0 && chunk == kChunks - 1;
        const uint4* first = repeats ? source - kRepeated / 8 : source;
#pragma unroll
        for (int i = 0; i < kCopiedRows; ++i) {
          if (!(real >> i & 1)) continue;
          if constexpr (kRepeated == 0) {
            copy16(target + i * kRowStep * 128, first + offsets[i]);
          } else {
            copy16_or_zeros(target + i * kRowStep * 128, first + offsets[i], !repeats || piece >= kRepeated / 8);
          }
        }
        mbarrier_arrive_after_copies(shared.full(stage.at));
        stage.advance();
      }
    }
    mbarrier_wait(shared.note_empty(note.at), note.parity ^ 1);
    if (thread == 0) shared.note(note.at).expert = -1;
    mbarrier_arrive(shared.note_full(note.at));
    wait_copies<0>();
  }

  static constexpr int kCopierBarrier = 1, kPartialsReadBarrier = 2, kPartialsWrittenBarrier = 3;

  // The packed unit at a place in a tile.
  __device__ __forceinline__ static int packed_unit(int column_tile, int unit) {
    return unit / kHalfUnits * (kColumns / kUnit) + column_tile * kHalfUnits + unit % kHalfUnits;
  }

  // What a stage has of one operand: kRows rows of kUnitBytes for each unit, of an expert's kRowsOfExpert. The units of
  // a half follow each other in memory as in the stage: a run. The four warps copy the runs of a chunk in turn.
  template <int kUnitBytes, int kRowsOfExpert, int kRows>
  struct Runs {
    static constexpr int kRowBytes = Problem::kN / kUnit * kUnitBytes;
    static constexpr int kRuns = kRows * kHalves, kRunBytes = kHalfUnits * kUnitBytes;
    static_assert(kRunBytes % 16 == 0, "whole pieces");

    const int warp;
    const unsigned char* const source;  // of the warp's first run, in an expert's first rows

    __device__ __forceinline__ Runs(const void* operand, int expert, int column_tile, int w)
        : warp(w),
          source(static_cast<const unsigned char*>(operand) +
                 (int64_t(expert) * kRowsOfExpert + w / kHalves) * kRowBytes +
                 packed_unit(column_tile, w % kHalves * kHalfUnits) * kUnitBytes) {}

    // One lane's: copies the warp's runs of the rows from `row` on, and has the barrier wait for them.
    __device__ __forceinline__ void copy(uint32_t target, int row, uint32_t barrier, uint64_t policy) const {
      const int runs = (kRuns + 3 - warp) / 4;
      if (kRuns >= 4 || runs > 0) mbarrier_expect_bytes(barrier, runs * kRunBytes);
#pragma unroll
      for (int i = 0; i < (kRuns + 3) / 4; ++i) {
        if (kRuns % 4 == 0 || i < runs) {
          copy_bulk<kRunBytes>(target + (warp + 4 * i) * kRunBytes,
                               source + int64_t(row) * kRowBytes + i * (4 / kHalves) * kRowBytes, barrier, policy);
        }
      }
    }
  };
  static constexpr int kStoredZeroBytes = Zeros::kStored ? Zeros::kUnitBytes : 16;  // a type that nobody uses if none

  // ---- The warpgroups that multiply.

  struct Lane {
    int share, warpgroup, warp, lane;  // of K; along the columns; in the warpgroup; in the warp

    // The first of this warp's kParts sub-tiles in a half: its unit in the tile, and its word there.
    __device__ __forceinline__ int unit(int half) const {
      return half * kHalfUnits + warpgroup * kParts + warp * kParts / 4;
    }
    __device__ __forceinline__ int word() const { return warp * kParts % 4; }
  };

  __device__ __forceinline__ void multiply(const Shared& shared) const {
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // known to be the same for the whole warp
    const Lane lane{warpgroup / Tile::kWarpgroupsN, warpgroup % Tile::kWarpgroupsN, int(threadIdx.x / 32 % 4),
                    int(threadIdx.x % 32)};
    Cursor<Tile::kStages> stage;
    Cursor<kNotes> note;
#pragma unroll 1
    for (;; note.advance()) {
      mbarrier_wait(shared.note_full(note.at), note.parity);
      const Note& notes = shared.note(note.at);
      if (notes.expert < 0) break;
      const int rows = max(max(notes.rows[0], notes.rows[1]), max(notes.rows[2], notes.rows[3]));
      multiply_rows<1>(rows, shared, notes, lane, stage);
      stage.template advance<kChunks>();
      __syncwarp();
      if (lane.lane == 0) mbarrier_arrive(shared.note_empty(note.at));
    }
  }

  // Tiles with few rows multiply only so many: quarters of the block, in eights.
  template <int kQuarters>
  __device__ __forceinline__ void multiply_rows(int rows, const Shared& shared, const Note& note, const Lane& lane,
                                                Cursor<Tile::kStages> stage) const {
    constexpr int kRows = (Tile::kTokens * kQuarters / 4 + 7) / 8 * 8;
    constexpr int kFewer = (Tile::kTokens * (kQuarters - 1) / 4 + 7) / 8 * 8;
    if constexpr (kRows == Tile::kTokens) {
      multiply_tile<kRows>(shared, note, lane, stage);
    } else {
      if (kRows > kFewer && rows <= kRows) return multiply_tile<kRows>(shared, note, lane, stage);
      multiply_rows<kQuarters + 1>(rows, shared, note, lane, stage);
    }
  }

  // What is left to multiply the sums by, beside the global scales, when the scales are in.
  static constexpr float kLeft =
      1.0f / (Tile::kScalesWeights ? CodeFragments::kFactor : CodeFragments::kFactor * Scales::kFactor);
  // Scales that T does not hold exactly come in two parts, so that they are not rounded before the weight is.
  static constexpr bool kSplitsScales = Tile::kScalesWeights && !kHoldsScale<T, typename Problem::Scale>;

  // Steps whose products are issued together: as many as there are registers for the weights, twice.
  static constexpr int kSumRegisters = Tile::kSubTiles * Tile::kTokens / 2 * (kTwoSums ? 2 : 1);
  static constexpr int kScalingRegisters =  // beyond the usual
      2 * Tile::kSubTiles *
      (kSplitsScales + kFloatZeros + (Zeros::kStored && CodeFragments::bias(0) != CodeFragments::bias(2)));
  static constexpr int kRoom = (Tile::kConsumerRegisters - Tile::kOtherRegisters - kSumRegisters - kScalingRegisters) /
                               (2 * Tile::kSubTiles * 4);
  static constexpr int kMost = kSteps / 2 < kStepsPerScale ? kSteps / 2 : kStepsPerScale;
  static constexpr int kBatch = kRoom >= 4 && kMost >= 4 ? 4 : kRoom >= 2 && kMost >= 2 ? 2 : 1;
  static constexpr int kBatches = kSteps / kBatch;

  __device__ __forceinline__ static uint32_t paired(float value) { return from_float<T>(value) * 0x10001u; }

  // The scales of this lane's columns (g and g + 8 of each sub-tile, g = lane / 4) in a half.
  __device__ __forceinline__ static Scales load_scales(uint32_t weights, int row, int half, const Lane& lane) {
    const int unit = row * kTileUnits + lane.unit(half);
    Scales scales;
    scales.load(weights + kScalesAt + (unit * kUnit + lane.lane / 4 * 8 + lane.word() * 2) * Scales::kBytes);
    return scales;
  }

  // From fragments of codes to weights (but for the scale, where the sums get it), in pairs of T.
  struct Scaling {
    // What pairs of either half of K have too much, negative: for the zero point, rounded to an integer.
    uint32_t offsets[Tile::kSubTiles][4];
    uint32_t scales[Tile::kSubTiles][2];
    uint32_t rests[Tile::kSubTiles][2];  // of the scales
    uint32_t zeros[Tile::kSubTiles][2];  // the zero point's fraction, as a weight

    __device__ __forceinline__ void load(uint32_t weights, int row, const Lane& lane) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        Zeros group_zeros;
        group_zeros.load(weights + kZerosAt + (row * kTileUnits + lane.unit(h)) * Zeros::kUnitBytes, lane.lane / 4);
        Scales group_scales;
        if constexpr (Tile::kScalesWeights) group_scales = load_scales(weights, row, h, lane);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const int j = h * kParts + p;
            const float zero = group_zeros[2 * (lane.word() + p) + b];
            const float whole = kFloatZeros ? rintf(zero) : zero;
            if constexpr (Zeros::kStored) {
              offsets[j][b] = paired(-CodeFragments::bias(0) - CodeFragments::kFactor * whole);
              offsets[j][2 + b] = paired(-CodeFragments::bias(2) - CodeFragments::kFactor * whole);
            }
            if constexpr (Tile::kScalesWeights) {
              const float scale = group_scales.exact(2 * p + b) * (1.0f / Scales::kFactor);
              scales[j][b] = paired(scale);
              if constexpr (kSplitsScales) rests[j][b] = paired(scale - to_float<T>(from_float<T>(scale)));
              if constexpr (kFloatZeros) zeros[j][b] = paired((whole - zero) * scale * CodeFragments::kFactor);
            }
          }
        }
      }
    }

    template <int i>
    __device__ __forceinline__ uint32_t weight(uint32_t code, int j) const {
      constexpr int kExponent = CodeFragments::exponent(i);
      if constexpr (Zeros::kStored) {
        code = multiply_add_pairs<T>(code, paired_power<T>(kExponent), offsets[j][i]);
      } else if constexpr (CodeFragments::kHasZero) {
        constexpr uint32_t kOffset =
            paired_negative<T>(CodeFragments::bias(i) + CodeFragments::kFactor * Zeros::kBaked);
        code = multiply_add_pairs<T>(code, paired_power<T>(kExponent), kOffset);
      } else if constexpr (kExponent != 0) {
        code = multiply_pairs<T>(code, paired_power<T>(kExponent));
      }
      if constexpr (!Tile::kScalesWeights) return code;
      const uint32_t scale = scales[j][i % 2];
      if constexpr (kSplitsScales && kFloatZeros) {
        return multiply_add_pairs<T>(code, scale, multiply_add_pairs<T>(code, rests[j][i % 2], zeros[j][i % 2]));
      } else if constexpr (kSplitsScales) {
        return multiply_add_pairs<T>(code, scale, multiply_pairs<T>(code, rests[j][i % 2]));
      } else if constexpr (kFloatZeros) {
        return multiply_add_pairs<T>(code, scale, zeros[j][i % 2]);
      } else {
        return multiply_pairs<T>(code, scale);
      }
    }

    __device__ __forceinline__ void apply(uint32_t (&a)[4], int j) const {
      a[0] = weight<0>(a[0], j), a[1] = weight<1>(a[1], j), a[2] = weight<2>(a[2], j), a[3] = weight<3>(a[3], j);
    }
  };

  // The scales of a group's sums.
  struct Factors {
    float scales[Tile::kSubTiles][2];

    __device__ __forceinline__ Factors(uint32_t weights, int row, const Lane& lane) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const auto group_scales = load_scales(weights, row, h, lane);
#pragma unroll
        for (int j = 0; j < 2 * kParts; ++j) {
          scales[h * kParts + j / 2][j % 2] = group_scales.exact(j);
        }
      }
    }

    template <int kSums, int kGroupSums>
    __device__ __forceinline__ void close(float (&sums)[Tile::kSubTiles][kSums],
                                          const float (&group_sums)[kGroupSums][kSums]) const {
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const float scale = scales[j][i / 2 % 2];
          sums[j][i] = kTwoSums ? sums[j][i] + group_sums[kTwoSums ? j : 0][i] * scale : sums[j][i] * scale;
        }
    }
  };

  template <int kN>
  __device__ __forceinline__ void multiply_tile(const Shared& shared, const Note& note, const Lane& lane,
                                                Cursor<Tile::kStages> stage) const {
    float sums[Tile::kSubTiles][kN / 2];                       // of the tile
    float group_sums[kTwoSums ? Tile::kSubTiles : 1][kN / 2];  // of the group, without its scales
    Fragments a[2];                                            // weights: being made, and in use
    Words words;
    Scaling scaling;
#pragma unroll
    for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        sums[j][i] = 0.0f;
        if constexpr (kTwoSums) group_sums[j][i] = 0.0f;
      }

    if constexpr (Tile::kWarpgroupsK > 1) {
      for (int i = 0; i < lane.share; ++i) stage.advance();
    }
    acquire(shared, stage);
    load(words, scaling, shared.weights(stage.at), 0, lane);
    make(a[0], words, scaling);
    bool fresh = true;  // the next product begins a sum
#pragma unroll 1
    for (int chunk = Tile::kWarpgroupsK > 1 ? lane.share : 0; chunk < kChunks; chunk += Tile::kWarpgroupsK) {
      const Cursor<Tile::kStages> here = stage;
      const uint32_t weights = shared.weights(here.at);
      const WgmmaRows tokens(shared.tokens(here.at));
      stage.template advance<Tile::kWarpgroupsK>();
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        if (batch + 1 < kBatches) load(words, scaling, weights, batch + 1, lane);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < kBatch; ++s) {
          const int step = batch * kBatch + s;
          const uint64_t b = tokens.at(step / 4 * kSlabBytes + step % 4 * 32);
          const bool begins = kTwoSums && kGroupsEndInChunks ? step % kStepsPerGroup == 0 : step == 0 && fresh;
#pragma unroll
          for (int j = 0; j < Tile::kSubTiles; ++j) {
            Wgmma<T, kN>::run(kTwoSums ? group_sums[kTwoSums ? j : 0] : sums[j], a[batch % 2][s][j], b, !begins);
          }
        }
        wgmma_commit();
        fresh = false;
        wgmma_wait<1>();  // the other half of `a` is free
        if (batch + 1 < kBatches) {
          make(a[(batch + 1) % 2], words, scaling);
        } else if (chunk + Tile::kWarpgroupsK < kChunks) {
          acquire(shared, stage);
          load(words, scaling, shared.weights(stage.at), 0, lane);
          make(a[0], words, scaling);
        }
        if constexpr (!Tile::kScalesWeights) {
          const int end = (batch + 1) * kBatch;  // in steps
          if (kGroupsEndInChunks ? end % kStepsPerGroup == 0 : end == kSteps && ends_group(chunk)) {
            const Factors factors(weights, (end - 1) / kStepsPerScale, lane);
            wgmma_wait<0>();
            factors.close(sums, group_sums);
            fresh = true;
          }
        }
      }
      wgmma_wait<0>();
      release(shared, here.at, lane);
    }
    if constexpr (Tile::kWarpgroupsK > 1) {
      if (!add_shares(shared, lane, sums)) return;
    }
    store<kN>(note, lane, sums);
  }

  static constexpr bool kGroupsEndInChunks = Problem::kGroup <= Tile::kBlockK;
  static constexpr int kStepsPerGroup = Problem::kGroup / kTileK;

  // Whether the chunk that a warpgroup takes after this one belongs to another group, or to another tile.
  __device__ __forceinline__ static bool ends_group(int chunk) {
    const int next = chunk + Tile::kWarpgroupsK;
    return next >= kChunks || chunk * Tile::kBlockK / Problem::kGroup != next * Tile::kBlockK / Problem::kGroup;
  }

  // Adds the sums of the warpgroups that share K, in their order. True for the one that has the total.
  template <int kSums>
  __device__ __forceinline__ static bool add_shares(const Shared& shared, const Lane& lane,
                                                    float (&sums)[Tile::kSubTiles][kSums]) {
    constexpr int kMultipliers = 128 * Tile::kWarpgroups;
    float* partials = reinterpret_cast<float*>(shared.bytes + kPartialsAt) + lane.warpgroup * (kThreadSums * 128) +
                      lane.warp * 32 + lane.lane;
    if (lane.share > 0) {
      named_barrier_sync<kPartialsReadBarrier>(kMultipliers);
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          partials[((lane.share - 1) * Tile::kWarpgroupsN * kThreadSums + j * kSums + i) * 128] = sums[j][i];
        }
      named_barrier_arrive<kPartialsWrittenBarrier>(kMultipliers);
      return false;
    }
    named_barrier_arrive<kPartialsReadBarrier>(kMultipliers);  // those of the tile before
    named_barrier_sync<kPartialsWrittenBarrier>(kMultipliers);
#pragma unroll
    for (int share = 1; share < Tile::kWarpgroupsK; ++share)
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j)
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          sums[j][i] += partials[((share - 1) * Tile::kWarpgroupsN * kThreadSums + j * kSums + i) * 128];
        }
    return true;
  }

  __device__ __forceinline__ static void acquire(const Shared& shared, const Cursor<Tile::kStages>& stage) {
    mbarrier_wait(shared.full(stage.at), stage.parity);
    fence_async_proxy();
  }
  __device__ __forceinline__ static void release(const Shared& shared, int stage, const Lane& lane) {
    __syncwarp();
    if (lane.lane == 0) mbarrier_arrive(shared.empty(stage));
  }

  using Words = uint32_t[kBatch][kHalves][kParts * kFragmentWords];
  using Fragments = uint32_t[kBatch][Tile::kSubTiles][4];

  // A batch's words, and the scales and zero points of the group that begins with it.
  __device__ __forceinline__ static void load(Words& words, Scaling& scaling, uint32_t weights, int batch,
                                              const Lane& lane) {
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        load_shared_words(words[s][h], weights + (batch * kBatch + s) * kStepBytes + lane.unit(h) * kUnitBytes +
                                           lane.lane * kLaneBytes + lane.word() * kFragmentWords * 4);
      }
    }
    const int step = batch * kBatch;
    if (step % kStepsPerScale == 0) scaling.load(weights, step / kStepsPerScale, lane);
  }

  __device__ __forceinline__ static void make(Fragments& a, const Words& words, const Scaling& scaling) {
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j) {
        CodeFragments::fragment(words[s][j / kParts] + j % kParts * kFragmentWords, a[s][j]);
        scaling.apply(a[s][j], j);
      }
    }
#pragma unroll
    for (int s = 0; s < kBatch; ++s)
#pragma unroll
      for (int j = 0; j < Tile::kSubTiles; ++j) wgmma_operand_ready(a[s][j]);
  }

  template <int kN>
  __device__ __forceinline__ void store(const Note& note, const Lane& lane,
                                        const float (&sums)[Tile::kSubTiles][kN / 2]) const {
    const ExpertIndex expert = note.expert;
    float factors[kHalves];  // of this lane's sums
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      factors[h] = kLeft;
      if constexpr (Problem::kGlobalScales) {
        factors[h] *=
            operands.global_scales[expert * (Problem::kN / kUnit) + packed_unit(note.column_tile, lane.unit(h))];
      }
    }
    const int first_column =
        note.column_tile * kHalfUnits * kUnit + lane.unit(0) * kUnit + lane.word() * 16 + lane.lane / 4;
#pragma unroll
    for (int t = 0; t < kN / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * t + lane.lane % 4 * 2 + i;
        const int slot = note.slots[row];
        if (slot < 0) continue;
        const float factor = note.factors[row];
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const int s = 4 * t + 2 * b + i;
            epilogue.store(expert, slot, factor, first_column + 16 * p + 8 * b, sums[p][s] * factors[0],
                           Epilogue::kGated ? sums[Tile::kSubTiles - kParts + p][s] * factors[kHalves - 1] : 0.0f);
          }
        }
      }
    }
  }
};

}  // namespace jmm
