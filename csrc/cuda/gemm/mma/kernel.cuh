// Grouped GEMM over packed experts on mma.sync, for few token rows per expert.
//
// The weights are the A operand (16 columns of W by 16 of K, straight out of Marlin's packing), the tokens the B
// operand, 8 at a time: a block of tokens costs no more than it has rows. Each warp is an engine of its own: it
// streams kUnits blocks of 64 columns over its share of K through a private ring in shared memory; the warps that share
// a part of K share the ring of its tokens and meet once a chunk. The grid is persistent, and the rings run on across
// tiles: the next tile's weights are on their way while this one is reduced and stored.
#pragma once

#include "epilogue.cuh"
#include "offsets.cuh"
#include "ptx/ptx.cuh"
#include "token_tiles.cuh"
#include "weights/fragments_raw.cuh"
#include "weights/zeros.cuh"

namespace jmm {

// How the work is cut. A block of threads makes kTokens x (kWarpsN * kUnits * 64 columns), kWarpsK warps sharing K.
// Where a product has fewer tiles than the card has multiprocessors, a cluster of blocks shares the K of a tile.
// Facts: MmaTile of jax_marlin_moe/cuda/kernels/mma.py.
template <class Facts>
struct MmaTile {
  static constexpr int kTokens = Facts::kTokens;        // rows of a token tile, a multiple of 8
  static constexpr int kUnits = Facts::kUnits;          // 64-column units of a warp
  static constexpr int kWarpsN = Facts::kWarpsN;        // warps side by side along the columns
  static constexpr int kWarpsK = Facts::kWarpsK;        // warps that share K
  static constexpr int kBlockK = Facts::kBlockK;        // rows of K in one stage of the ring
  static constexpr int kStages = Facts::kStages;        // stages of the ring
  static constexpr int kCtasPerSm = Facts::kCtasPerSm;  // resident CTAs that the register budget allows for
  static constexpr int kCluster = Facts::kCluster;      // CTAs that share K, neighbours in the grid
  static constexpr int kWarps = kWarpsN * kWarpsK;
  static constexpr int kThreads = 32 * kWarps;
  static_assert(kTokens % 8 == 0 && kTokens <= 32, "a lane holds the slot of one row");
  static_assert(kStages >= 2, "one stage is read while another is filled");
};

// Facts: Problem of jax_marlin_moe/cuda/kernels/problem.py.
template <class Facts>
struct Problem {
  using T = typename Facts::Element;  // of x
  using Code = typename Facts::Code;
  using Scale = typename Facts::Scale;                         // type of the scales
  using Zeros = typename Facts::Zeros;                         // kind of zero points
  static constexpr bool kGlobalScales = Facts::kGlobalScales;  // float32 factors of each 64 columns
  static constexpr int kK = Facts::kK, kN = Facts::kN;         // of the packed matrix
  static constexpr int kExperts = Facts::kExperts;
  static constexpr int kGroup = Facts::kGroup;              // rows of K that share a scale; the last may be shorter
  static constexpr int kRowStride = Facts::kRowStride;      // elements from a row of x to the next
  static constexpr int kSlotsPerRow = Facts::kSlotsPerRow;  // slot s reads row s / kSlotsPerRow of x
  using ExpertIndex = Index<int64_t(kExperts) * kN>;        // of a column among those of all experts
  using ScaleElement = typename ColumnScales<Scale, 8>::Element;
  using ZeroElement = typename ColumnZeros<Zeros, Code, Scale>::Element;
  static_assert(kK <= kRowStride, "a row of x has all of K");
};

template <class Problem, class Tile, class TokenTiles, class Epilogue>
class GroupedGemm {
  using T = typename Problem::T;
  using Code = typename Problem::Code;
  using Fragments = RawFragments<Code, T>;
  using Scales = ColumnScales<typename Problem::Scale, 8>;
  using Zeros = ColumnZeros<typename Problem::Zeros, Code, typename Problem::Scale>;

  static constexpr int kTileK = 16, kUnit = 64;                          // Marlin's tile
  static constexpr int kWordsOfSubTile = Code::kBits / 4;                // of a lane: eight codes
  static constexpr int kWordsPerUnit = 128 * kWordsOfSubTile;            // 16 x 64 codes
  static constexpr int kRowWords = Problem::kN / kUnit * kWordsPerUnit;  // of 16 rows of K
  static constexpr int kSubTiles = kUnit / 16;                           // MMA rows in a unit, one word of a lane each
  static constexpr int kTokenTiles = Tile::kTokens / 8;
  // K is cut into chunks, of which the last may be shorter; shares of K are whole chunks, as many as can be alike.
  static constexpr int kShares = Tile::kWarpsK * Tile::kCluster;
  static constexpr int kChunks = (Problem::kK + Tile::kBlockK - 1) / Tile::kBlockK;
  static constexpr int kSteps = Tile::kBlockK / kTileK;
  static constexpr int kLastSteps = kSteps - (kChunks * Tile::kBlockK - Problem::kK) / kTileK;  // of the last chunk
  static constexpr bool kShortens = kLastSteps < kSteps;
  static constexpr int kGroups = (Problem::kK + Problem::kGroup - 1) / Problem::kGroup;
  static constexpr int kScaleRows = Tile::kBlockK > Problem::kGroup ? Tile::kBlockK / Problem::kGroup : 1;
  static constexpr int kStepsPerScale = kSteps / kScaleRows;
  static constexpr bool kGroupsInChunk = Problem::kGroup <= Tile::kBlockK;  // every chunk is whole groups
  // Whether codes have a zero point that the sums of x must take out.
  static constexpr bool kTokenSums = Zeros::kStored || Zeros::kBaked != 0.0f;
  // A gated tile holds as many gate units as up units; its columns are those of the product. Gate and up of a column
  // belong to one warp where a warp has two units, to the lower and the upper half of the warps where it has one.
  static constexpr int kHalves = Epilogue::kGated ? 2 : 1;
  static constexpr int kOutputUnits = Tile::kWarpsN * Tile::kUnits / kHalves;
  static constexpr bool kPairedInWarp = Epilogue::kGated && Tile::kUnits == 2;
  static constexpr int kColumns = Problem::kN / kHalves;
  static constexpr int kUnitStride = kPairedInWarp ? kColumns / kUnit : 1;  // between the units of a warp
  static constexpr int kColumnTiles = kColumns / (kUnit * kOutputUnits);

  static_assert(kChunks >= kShares, "every warp has a chunk");
  static_assert(Problem::kGroup % Tile::kBlockK == 0 || Tile::kBlockK % Problem::kGroup == 0,
                "a chunk is part of one group, or whole groups");
  static_assert(Tile::kWarpsN * Tile::kUnits % kHalves == 0, "gate and up come in pairs");
  static_assert(kColumns % (kUnit * kOutputUnits) == 0, "column tiles are whole");
  static_assert(kColumns == Epilogue::kColumns, "the epilogue has the product's columns");
  static_assert(TokenTiles::kExperts == Problem::kExperts, "token tiles are of the matrix's experts");
  static_assert(TokenTiles::kBlock == 1 || TokenTiles::kBlock == Tile::kTokens, "rows of a token tile");

  // One stage of a warp's ring of weights, and of the ring of tokens that kWarpsN warps share, in bytes.
  static constexpr int kUnitBytes = kWordsPerUnit * 4;
  static constexpr int kStepBytes = Tile::kUnits * kUnitBytes;  // packed weights of 16 rows of K
  static constexpr int kUnitScaleBytes = kUnit * Scales::kBytes;
  static constexpr int kScalesAt = kSteps * kStepBytes;
  static constexpr int kZerosAt = kScalesAt + kScaleRows * Tile::kUnits * kUnitScaleBytes;
  static constexpr int kWeightStage = kZerosAt + kScaleRows * Tile::kUnits * Zeros::kUnitBytes;
  static constexpr int kTokenStage = Tile::kTokens * Tile::kBlockK * 2;  // rows of kBlockK, 16-byte pieces swizzled
  static_assert(kWeightStage % 16 == 0 && kTokenStage % 16 == 0, "stages stay aligned for 16-byte copies");

  static constexpr int kFragments = kHalves * kOutputUnits * kSubTiles * kTokenTiles;  // 16 x 8 sums each
  // Sums need no exchange where one warp has all of K, and both of gate and up.
  static constexpr bool kExchanges = Tile::kWarpsK * Tile::kCluster > 1 || (Epilogue::kGated && !kPairedInWarp);

  static constexpr int kTokensAt = Tile::kWarps * Tile::kStages * kWeightStage;
  static constexpr int kPartialsAt = kTokensAt + Tile::kWarpsK * Tile::kStages * kTokenStage;
  static constexpr int kBlocksAt = kPartialsAt + (kExchanges ? Tile::kWarpsK * kFragments * 512 : 0);
  static_assert(TokenTiles::kScratchBytes <= kBlocksAt, "the rings lend their memory before they are filled");
  using Blocks = typename TokenTiles::template Blocks<Tile::kThreads>;
  using ExpertIndex = typename Problem::ExpertIndex;

 public:
  // Of the elements of x.
  using RowOffset = Offset<((TokenTiles::kSlots - 1) / Problem::kSlotsPerRow + int64_t(1)) * Problem::kRowStride>;
  static constexpr int kSharedBytes = kBlocksAt + TokenTiles::kSharedBytes;
  static constexpr int kThreads = Tile::kThreads, kCtasPerSm = Tile::kCtasPerSm, kCluster = Tile::kCluster;
  using ScaleElement = typename Problem::ScaleElement;
  using ZeroElement = typename Problem::ZeroElement;
  static constexpr int64_t kWorkTiles = int64_t(TokenTiles::kMaxTiles) * kColumnTiles;
  static constexpr int64_t kMaxCtas = (kWorkTiles > 0 ? kWorkTiles : 1) * kCluster;

  const T* __restrict__ x;                   // [rows, kRowStride], of which the first K columns count
  const int32_t* __restrict__ packed;        // [experts, K / 16, kRowWords]
  const unsigned char* __restrict__ scales;  // [experts, groups, N] of ScaleElement, in Marlin order
  const unsigned char* __restrict__ zeros;   // [experts, groups, N] of ZeroElement, in Marlin order, if stored
  const float* __restrict__ global_scales;   // [experts, N / 64] if kGlobalScales
  TokenTiles token_tiles;
  Epilogue epilogue;

  __device__ void run(unsigned char* shared_bytes) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_n = warp % Tile::kWarpsN, warp_k = warp / Tile::kWarpsN;
    const uint32_t weight_ring = smem_address(shared_bytes) + warp * (Tile::kStages * kWeightStage);
    const uint32_t token_ring = smem_address(shared_bytes) + kTokensAt + warp_k * (Tile::kStages * kTokenStage);

    if constexpr (TokenTiles::kNeedsPreviousKernel) wait_for_previous_kernel();
    allow_next_kernel();
    const Blocks blocks(token_tiles, shared_bytes + kBlocksAt, shared_bytes);
    const int tiles = blocks.count() * kColumnTiles;

    const int share = block_of_cluster() * Tile::kWarpsK + warp_k;  // of K
    const int chunks = chunks_of(share);
    Loader loader(*this, blocks, warp_n, share, lane, tiles);
    // Weights do not depend on the kernel before; tokens may.
    constexpr int kAhead = Tile::kStages - 1;
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s < chunks) loader.load_weights(weight_ring + s * kWeightStage, s);
    }
    if constexpr (!TokenTiles::kNeedsPreviousKernel) wait_for_previous_kernel();
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s >= chunks) loader.load_weights(weight_ring + s * kWeightStage, 0);
      loader.load_scales(weight_ring + s * kWeightStage);
      loader.load_tokens(token_ring + s * kTokenStage);
      loader.advance();
      commit_copies();
    }

    Multiplier multiplier(lane);
    int stage = 0;
    for (int tile = first_tile(); tile < tiles; tile += tile_stride()) {
      multiplier.begin_tile();
      const Rows rows(*this, blocks, tile, warp_n, lane);  // fetched now, wanted when the tile is done
      int rows_left = Problem::kGroup - first_row(share) % Problem::kGroup;  // of K, in the current group
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        wait_copies<kAhead - 1>();
        meet(warp_k);  // everybody's copies have arrived, and nobody reads the stage that is filled next
        const int free = stage == 0 ? kAhead : stage - 1;
        loader.load_weights(weight_ring + free * kWeightStage, 0);
        loader.load_scales(weight_ring + free * kWeightStage);
        loader.load_tokens(token_ring + free * kTokenStage);
        loader.advance();
        commit_copies();
        rows_left -= Tile::kBlockK;
        multiplier.multiply(rows.token_tiles, weight_ring + stage * kWeightStage, token_ring + stage * kTokenStage,
                            rows_left <= 0 || chunk == chunks - 1, is_short(share, chunk));
        if (rows_left <= 0) rows_left = Problem::kGroup;
        stage = stage == kAhead ? 0 : stage + 1;
      }
      multiplier.apply(rows.global_scales);
      finish(shared_bytes, tile, rows, warp, warp_n, warp_k, lane, multiplier.sums);
    }
    wait_copies<0>();
    if constexpr (Tile::kCluster > 1) meet_cluster();  // nobody reads this block's shared memory any more
  }

 private:
  // Chunks and the first row of a share of K.
  __device__ __forceinline__ static int chunks_of(int share) {
    if constexpr (kChunks % kShares == 0) return kChunks / kShares;
    return (share + 1) * kChunks / kShares - share * kChunks / kShares;
  }
  __device__ __forceinline__ static int first_row(int share) {
    if constexpr (kChunks % kShares == 0) return share * (kChunks / kShares * Tile::kBlockK);
    return share * kChunks / kShares * Tile::kBlockK;
  }
  // Whether a chunk of a share is the last one of K, of kLastSteps.
  __device__ __forceinline__ static bool is_short(int share, int chunk) {
    return kShortens && share == kShares - 1 && chunk == chunks_of(share) - 1;
  }

  __device__ __forceinline__ static int block_of_cluster() { return blockIdx.x % Tile::kCluster; }
  __device__ __forceinline__ static int first_tile() { return blockIdx.x / Tile::kCluster; }
  __device__ __forceinline__ static int tile_stride() { return gridDim.x / Tile::kCluster; }

  static constexpr int kPieces = Tile::kBlockK / 8;      // 16-byte pieces of a token's row in a chunk
  static constexpr int kCopyLanes = 32 * Tile::kWarpsN;  // that share the copying of a chunk's tokens
  static constexpr int kPiecesOfLane = (Tile::kTokens * kPieces + kCopyLanes - 1) / kCopyLanes;

  // Where the 16-byte piece `p` of a unit lies in a stage. A lane reads kWordsOfSubTile pieces side by side; with two,
  // every other row of 128 bytes has its pieces exchanged in pairs, so that eight lanes meet no bank twice.
  __device__ __forceinline__ static uint32_t piece_offset(int p) {
    return (kWordsOfSubTile == 1 ? p : p ^ (p / 8 % 2)) * 16;
  }

  template <int kShare>
  __device__ __forceinline__ static void meet_in(int warp_k) {
    if constexpr (kShare < Tile::kWarpsK) {
      if (warp_k == kShare) {
        barrier<1 + kShare>(kCopyLanes);
      } else {
        meet_in<kShare + 1>(warp_k);
      }
    }
  }

  // The warps that share a part of K.
  __device__ __forceinline__ static void meet(int warp_k) {
    if constexpr (Tile::kWarpsN == 1) {
      __syncwarp();
    } else if constexpr (Tile::kWarpsK == 1) {
      __syncthreads();
    } else {
      meet_in<0>(warp_k);
    }
  }

  // Which of gate and up a warp's unit is, and which of the tile's output units.
  __device__ __forceinline__ static int half_of(int warp_n, int u) {
    if constexpr (!Epilogue::kGated) return 0;
    return kPairedInWarp ? u : warp_n / kOutputUnits;
  }
  __device__ __forceinline__ static int output_unit(int warp_n, int u) {
    if constexpr (!Epilogue::kGated) return warp_n * Tile::kUnits + u;
    return kPairedInWarp ? warp_n : warp_n % kOutputUnits;
  }
  // The first 64-column unit of the packed matrix that a warp reads for a tile.
  __device__ __forceinline__ static int first_unit(int tile, int warp_n) {
    return half_of(warp_n, 0) * (kColumns / kUnit) + tile % kColumnTiles * kOutputUnits + output_unit(warp_n, 0);
  }

  // Where a piece lies in a stage. The 8 rows that ldmatrix reads at once fall into 8 different groups of 4 banks.
  __device__ __forceinline__ static int swizzled(int row, int piece) {
    const int linear = row * kPieces + piece;
    return 16 * (linear ^ (kPieces > 8 ? row % 8 : linear / 8 % kPieces));
  }

  // What the end of a tile needs to know about its rows. Lane r holds row r.
  struct Rows {
    int expert;                         // -1 where the tile has nothing to do
    int slot;                           // -1 where the row is padding
    float factor;                       // of the row
    int token_tiles;                    // groups of 8 rows that are not all padding
    float global_scales[Tile::kUnits];  // of this warp's units

    __device__ __forceinline__ Rows(const GroupedGemm& gemm, const Blocks& blocks, int tile, int warp_n, int lane) {
      const int block = tile / kColumnTiles;
      expert = blocks.expert(block);
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u) {
        global_scales[u] = 1.0f;
        if constexpr (Problem::kGlobalScales) {
          const int unit = first_unit(tile, warp_n) + u * kUnitStride;
          global_scales[u] = gemm.global_scales[ExpertIndex(max(expert, 0)) * (Problem::kN / kUnit) + unit];
        }
      }
      slot = lane < Tile::kTokens ? blocks.slot(block, lane) : -1;
      if constexpr (TokenTiles::kMayRepeat) slot = blocks.first_listed(slot, block, lane);
      factor = slot >= 0 ? gemm.epilogue.factor(slot) : 0.0f;
      token_tiles = 1;
      if constexpr (kTokenTiles > 1) token_tiles = (39 - __clz(__ballot_sync(~0u, slot >= 0) | 1)) / 8;
    }
  };

  // Walks the (tile, chunk) sequence of one warp ahead of the multiplication and fills the ring.
  struct Loader {
    const GroupedGemm& gemm;
    const Blocks& blocks;
    const int warp_n, share, lane, tiles;
    const uint64_t policy = evict_first_policy();
    int tile, chunk = 0;
    int expert, row;                      // of the tile being loaded; lane r holds row r of x
    int next_expert, next_row;            // of the tile after it, fetched ahead
    const uint32_t* weights;              // this lane's 16 bytes of the first step of the chunk
    const T* tokens;                      // the chunk's first column of x, this lane's piece
    RowOffset token_rows[kPiecesOfLane];  // element offsets of the rows of this lane's pieces
    uint32_t token_copies;                // bit i: piece i exists
    int rows_left;                        // of K, in the current group
    int group;                            // of the chunk

    __device__ __forceinline__ Loader(const GroupedGemm& g, const Blocks& b, int wn, int s, int l, int t)
        : gemm(g), blocks(b), warp_n(wn), share(s), lane(l), tiles(t), tile(first_tile()) {
      fetch(tile, expert, row);
      fetch(tile + tile_stride(), next_expert, next_row);
      begin_tile();
    }

    __device__ __forceinline__ void fetch(int t, int& e, int& r) const {
      e = r = -1;
      if (t >= tiles) return;
      const int block = t / kColumnTiles;
      e = blocks.expert(block);
      if (lane < Tile::kTokens) {
        const int slot = blocks.slot(block, lane);
        r = slot < 0 ? -1 : slot / Problem::kSlotsPerRow;
      }
      if (!__any_sync(~0u, r >= 0)) e = -1;  // nothing but padding
    }

    __device__ __forceinline__ void begin_tile() {
      const int k = first_row(share);
      const int unit = first_unit(tile, warp_n);
      weights = reinterpret_cast<const uint32_t*>(gemm.packed) +
                (int64_t(max(expert, 0)) * (Problem::kK / kTileK) + k / kTileK) * kRowWords + unit * kWordsPerUnit +
                lane * 4;
      tokens = gemm.x + k + copy_lane() % kPieces * 8;
      token_copies = 0;
#pragma unroll
      for (int i = 0; i < kPiecesOfLane; ++i) {
        const int r = (i * kCopyLanes + copy_lane()) / kPieces;
        const int source_row = __shfl_sync(~0u, row, r % 32);
        token_rows[i] = static_cast<RowOffset>(max(source_row, 0)) * Problem::kRowStride;
        if (r < Tile::kTokens && source_row >= 0 && expert >= 0) token_copies |= 1u << i;
      }
      rows_left = Problem::kGroup - k % Problem::kGroup;
      group = k / Problem::kGroup;
    }

    __device__ __forceinline__ int copy_lane() const { return warp_n * 32 + lane; }

    // `ahead` chunks past the cursor, within its tile.
    __device__ __forceinline__ void load_weights(uint32_t stage, int ahead) const {
      if (expert < 0) return;
      const uint32_t* source = weights + ahead * kSteps * kRowWords;
      const bool shortened = is_short(share, chunk + ahead);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step == kLastSteps && shortened) break;
#pragma unroll
        for (int u = 0; u < Tile::kUnits; ++u) {
#pragma unroll
          for (int half = 0; half < kWordsOfSubTile; ++half) {
            copy16_streamed(stage + step * kStepBytes + u * kUnitBytes + piece_offset(half * 32 + lane),
                            source + step * kRowWords + u * kUnitStride * kWordsPerUnit + half * 128, policy);
          }
        }
      }
    }

    // A token's row that does not exist is not copied: it meets the weights in a column of its own, never stored.
    __device__ __forceinline__ void load_tokens(uint32_t stage) const {
      if (expert < 0 || (is_short(share, chunk) && copy_lane() % kPieces >= kLastSteps * (kTileK / 8))) return;
#pragma unroll
      for (int i = 0; i < kPiecesOfLane; ++i) {
        if (token_copies >> i & 1) {
          copy16(stage + swizzled((i * kCopyLanes + copy_lane()) / kPieces, copy_lane() % kPieces),
                 tokens + token_rows[i]);
        }
      }
    }

    // Scales and zero points are wanted when a group closes.
    __device__ __forceinline__ void load_scales(uint32_t stage) const {
      if (expert < 0 || (rows_left > Tile::kBlockK && chunk < chunks_of(share) - 1)) return;
      const int64_t first = int64_t(expert) * kGroups + group;
      const int unit = first_unit(tile, warp_n);
      copy_rows<kUnitScaleBytes>(stage + kScalesAt, gemm.scales, first, unit);
      if constexpr (Zeros::kStored) copy_rows<Zeros::kUnitBytes>(stage + kZerosAt, gemm.zeros, first, unit);
    }

    // The rows of kScaleRows groups, kBytes for each unit of 64 columns.
    template <int kBytes>
    __device__ __forceinline__ void copy_rows(uint32_t shared, const void* operand, int64_t group, int unit) const {
      const unsigned char* source = static_cast<const unsigned char*>(operand);
      constexpr int kPieces = kBytes / 16, kAllPieces = kScaleRows * Tile::kUnits * kPieces;
      constexpr int kLastRows = (kLastSteps + kStepsPerScale - 1) / kStepsPerScale;
      const int rows = kLastRows < kScaleRows && is_short(share, chunk) ? kLastRows : kScaleRows;
#pragma unroll
      for (int i = 0; i < kAllPieces; i += 32) {
        const int piece = i + lane, row = piece / (Tile::kUnits * kPieces), u = piece / kPieces % Tile::kUnits;
        if ((kAllPieces % 32 == 0 && kLastRows == kScaleRows) || row < rows) {
          copy16(shared + piece * 16, source +
                                          ((group + row) * (Problem::kN / kUnit) + unit + u * kUnitStride) * kBytes +
                                          piece % kPieces * 16);
        }
      }
    }

    __device__ __forceinline__ void advance() {
      weights += kSteps * kRowWords;
      tokens += Tile::kBlockK;
      rows_left -= Tile::kBlockK;
      if (rows_left <= 0) {
        rows_left = Problem::kGroup;
        group += kScaleRows;
      }
      if (++chunk == chunks_of(share)) {
        chunk = 0;
        tile += tile_stride();
        expert = next_expert;
        row = next_row;
        fetch(tile + tile_stride(), next_expert, next_row);
        begin_tile();
      }
    }
  };

  // Multiplies stages into float32 sums.
  struct Multiplier {
    float sums[Tile::kUnits][kSubTiles][kTokenTiles][4];        // scaled, of the tile
    float group_sums[Tile::kUnits][kSubTiles][kTokenTiles][4];  // of codes, of the group
    float token_sums[kTokenTiles][4];                           // of x alone, of the group
    const int lane;
    uint32_t token_offsets[kSteps];  // of this lane's ldmatrix row, for the first 8 tokens

    __device__ __forceinline__ explicit Multiplier(int l) : lane(l) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) token_offsets[step] = swizzled(lane % 8, step * 2 + lane / 8 % 2);
    }

    __device__ __forceinline__ void begin_tile() {
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u)
#pragma unroll
        for (int w = 0; w < kSubTiles; ++w)
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[u][w][t][i] = 0.0f;
      clear_group_sums();
    }

    __device__ __forceinline__ void clear_group_sums() {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) token_sums[t][i] = 0.0f;
#pragma unroll
        for (int u = 0; u < Tile::kUnits; ++u)
#pragma unroll
          for (int w = 0; w < kSubTiles; ++w)
#pragma unroll
            for (int i = 0; i < 4; ++i) group_sums[u][w][t][i] = 0.0f;
      }
    }

    // Only the first `token_tiles` groups of 8 rows are multiplied.
    __device__ __forceinline__ void multiply(int token_tiles, uint32_t stage, uint32_t tokens, bool closes_group,
                                             bool shortened) {
      if constexpr (kTokenTiles >= 4) {
        if (token_tiles == 4) return multiply<4>(stage, tokens, closes_group, shortened);
      }
      if constexpr (kTokenTiles >= 3) {
        if (token_tiles == 3) return multiply<3>(stage, tokens, closes_group, shortened);
      }
      if constexpr (kTokenTiles >= 2) {
        if (token_tiles == 2) return multiply<2>(stage, tokens, closes_group, shortened);
      }
      multiply<1>(stage, tokens, closes_group, shortened);
    }

    template <int kActive>
    __device__ __forceinline__ void multiply(uint32_t stage, uint32_t tokens, bool closes_group, bool shortened) {
      constexpr int kExponents[2] = {Fragments::token_exponent(0), Fragments::token_exponent(1)};  // of the halves of K
      constexpr uint32_t kOnes[2] = {paired_power<T>(-kExponents[0]), paired_power<T>(-kExponents[1])};
      const uint32_t ones[4] = {kOnes[0], kOnes[0], kOnes[1], kOnes[1]};  // that make up for them
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step == kLastSteps && shortened) {
          if constexpr (kGroupsInChunk && kLastSteps % kStepsPerScale != 0) {  // of a group that is shorter, too
            close_group<kActive>(stage, kLastSteps / kStepsPerScale);
          }
          break;
        }
        const bool opens_group = kGroupsInChunk && step % kStepsPerScale == 0;
        uint32_t b[kActive][2];
#pragma unroll
        for (int t = 0; t < kActive; ++t) {
          load_matrices_x2(b[t], tokens + token_offsets[step] + t * 8 * Tile::kBlockK * 2);
          if constexpr (kExponents[0] != 0) {
            b[t][0] = multiply_pairs<T>(b[t][0], paired_power<T>(kExponents[0]));
            b[t][1] = multiply_pairs<T>(b[t][1], paired_power<T>(kExponents[1]));
          }
          if constexpr (kTokenSums) multiply_into(token_sums[t], ones, b[t], opens_group);
        }
#pragma unroll
        for (int u = 0; u < Tile::kUnits; ++u) {
          uint32_t words[kSubTiles * kWordsOfSubTile];
#pragma unroll
          for (int half = 0; half < kWordsOfSubTile; ++half) {
            const uint4 four =
                load_shared16(stage + step * kStepBytes + u * kUnitBytes + piece_offset(lane * kWordsOfSubTile + half));
            words[4 * half] = four.x, words[4 * half + 1] = four.y;
            words[4 * half + 2] = four.z, words[4 * half + 3] = four.w;
          }
#pragma unroll
          for (int w = 0; w < kSubTiles; ++w) {
            uint32_t a[4];
            Fragments::fragment(words + w * kWordsOfSubTile, a);
#pragma unroll
            for (int t = 0; t < kActive; ++t) multiply_into(group_sums[u][w][t], a, b[t], opens_group);
          }
        }
        if constexpr (kGroupsInChunk) {
          if (step % kStepsPerScale == kStepsPerScale - 1) close_group<kActive>(stage, step / kStepsPerScale);
        }
      }
      if constexpr (!kGroupsInChunk) {
        if (closes_group) {
          close_group<kActive>(stage, 0);
          clear_group_sums();
        }
      }
    }

    __device__ __forceinline__ static void multiply_into(float (&sums)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2], bool fresh) {
      if (fresh) {
        mma_16x8x16_fresh<T>(sums, a, b);
      } else {
        mma_16x8x16<T>(sums, a, b);
      }
    }

    // sums += (group_sums - zero * token_sums) * scale.
    template <int kActive>
    __device__ __forceinline__ void close_group(uint32_t stage, int scale_row) {
      const int column = lane / 4;  // this lane's columns are column + 8 j, j = 0..7
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u) {
        const int row = scale_row * Tile::kUnits + u;
        Scales scales;
        scales.load(stage + kScalesAt + row * kUnitScaleBytes + column * 8 * Scales::kBytes);
        Zeros zeros;
        zeros.load(stage + kZerosAt + row * Zeros::kUnitBytes, column);
#pragma unroll
        for (int w = 0; w < kSubTiles; ++w) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {  // columns g and g + 8 of the sub-tile
            const float scale = scales[2 * w + b];
            const float zero = Fragments::kFactor * zeros[2 * w + b];
#pragma unroll
            for (int t = 0; t < kActive; ++t) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {  // tokens 2t and 2t + 1
                float codes = group_sums[u][w][t][2 * b + i];
                if constexpr (kTokenSums) codes -= zero * token_sums[t][i];
                sums[u][w][t][2 * b + i] += codes * scale;
              }
            }
          }
        }
      }
    }

    // The steps of codes and scales, and the global scales, once a tile.
    __device__ __forceinline__ void apply(const float (&global_scales)[Tile::kUnits]) {
      constexpr float kFactor = Fragments::kFactor * Scales::kFactor;
      if constexpr (Problem::kGlobalScales || kFactor != 1.0f) {
#pragma unroll
        for (int u = 0; u < Tile::kUnits; ++u)
#pragma unroll
          for (int w = 0; w < kSubTiles; ++w)
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
              for (int i = 0; i < 4; ++i) sums[u][w][t][i] *= global_scales[u] * (1.0f / kFactor);
      }
    }
  };

  using Sums = float[Tile::kUnits][kSubTiles][kTokenTiles][4];

  // Adds the shares of K in a fixed order and hands each sum to the epilogue.
  __device__ __forceinline__ void finish(unsigned char* shared_bytes, int tile, const Rows& rows, int warp, int warp_n,
                                         int warp_k, int lane, const Sums& sums) const {
    if constexpr (!kExchanges) {
      if (rows.expert < 0) return;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int u = 0; u < Tile::kUnits / kHalves; ++u) {
#pragma unroll
          for (int w = 0; w < kSubTiles; ++w) {
            const float (&first)[4] = sums[u][w][t];
            const float (&second)[4] = sums[Epilogue::kGated ? 1 : u][w][t];
            store(rows, t, tile, output_unit(warp_n, u) * kSubTiles + w, lane,
                  float4{first[0], first[1], first[2], first[3]}, float4{second[0], second[1], second[2], second[3]});
          }
        }
      }
    } else {
      float4* partials = reinterpret_cast<float4*>(shared_bytes + kPartialsAt);
      meet_sharers();  // the partials of the tile before have been read
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u) {
        const int unit = half_of(warp_n, u) * kOutputUnits + output_unit(warp_n, u);
#pragma unroll
        for (int w = 0; w < kSubTiles; ++w) {
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) {
            const int fragment = (unit * kSubTiles + w) * kTokenTiles + t;
            const float (&s)[4] = sums[u][w][t];
            partials[(warp_k * kFragments + fragment) * 32 + lane] = float4{s[0], s[1], s[2], s[3]};
          }
        }
      }
      meet_sharers();
      if (rows.expert < 0) return;
      constexpr int kOutputFragments = kFragments / kHalves;
      const uint32_t shares = smem_address(partials);
#pragma unroll 1
      for (int f = block_of_cluster() * Tile::kWarps + warp; f < kOutputFragments; f += Tile::kCluster * Tile::kWarps) {
        const float4 first = add_shares(shares, f, lane);
        const float4 second = Epilogue::kGated ? add_shares(shares, f + kOutputFragments, lane) : float4{};
        store(rows, f % kTokenTiles, tile, f / kTokenTiles, lane, first, second);
      }
    }
  }

  // One 16 x 8 fragment: this lane's columns g and g + 8 of the tile's sub-tile, for an even and an odd row.
  __device__ __forceinline__ void store(const Rows& rows, int token_tile, int tile, int sub_tile, int lane,
                                        float4 first, float4 second) const {
    const int column = (tile % kColumnTiles * (kOutputUnits * kSubTiles) + sub_tile) * 16 + lane / 4;
    const int row = token_tile * 8 + lane % 4 * 2;
    const ExpertIndex expert = rows.expert;
    const int even = __shfl_sync(~0u, rows.slot, row), odd = __shfl_sync(~0u, rows.slot, row + 1);
    const float even_factor = __shfl_sync(~0u, rows.factor, row), odd_factor = __shfl_sync(~0u, rows.factor, row + 1);
    if (even >= 0) {
      epilogue.store(expert, even, even_factor, column, first.x, second.x);
      epilogue.store(expert, even, even_factor, column + 8, first.z, second.z);
    }
    if (odd >= 0) {
      epilogue.store(expert, odd, odd_factor, column, first.y, second.y);
      epilogue.store(expert, odd, odd_factor, column + 8, first.w, second.w);
    }
  }

  // All threads that share the K of a tile.
  __device__ __forceinline__ static void meet_sharers() {
    if constexpr (Tile::kCluster > 1) {
      meet_cluster();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ static float4 add_shares(uint32_t partials, int fragment, int lane) {
    float4 sum;
#pragma unroll
    for (int block = 0; block < Tile::kCluster; ++block) {
      const uint32_t theirs = Tile::kCluster > 1 ? shared_of_block(partials, block) : partials;
#pragma unroll
      for (int k = 0; k < Tile::kWarpsK; ++k) {
        const uint32_t at = theirs + ((k * kFragments + fragment) * 32 + lane) * 16;
        const float4 part = Tile::kCluster > 1 ? load_cluster16(at) : as_floats(load_shared16(at));
        if (block + k == 0) {
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
