// Grouped GEMM over packed experts on mma.sync, for few token rows per expert.
//
// The weights are the A operand (16 columns of W by 16 of K, straight out of Marlin's packing), the tokens the B
// operand, 8 at a time: a block of tokens costs no more than it has rows. Each warp is an engine of its own: it
// streams kUnits blocks of 64 columns over its share of K through a private ring in shared memory, so the main loop
// has no barrier but the warp's. The grid is persistent, and the ring runs on across tiles: the next tile's weights
// are on their way while this one is reduced and stored.
#pragma once

#include "dequant.cuh"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "routing.cuh"

namespace jmm {

// How the work is cut. A block of threads makes kTokens x (kWarpsN * kUnits * 64 columns), kWarpsK warps sharing K.
template <int kTokens_, int kUnits_, int kWarpsN_, int kWarpsK_, int kChunkK_, int kStages_, int kBlocksPerSm_>
struct Tile {
  static constexpr int kTokens = kTokens_;            // rows of a block of tokens, a multiple of 8
  static constexpr int kUnits = kUnits_;              // 64-column units of a warp
  static constexpr int kWarpsN = kWarpsN_;            // warps side by side along the columns
  static constexpr int kWarpsK = kWarpsK_;            // warps that share K
  static constexpr int kChunkK = kChunkK_;            // rows of K in one stage of the ring
  static constexpr int kStages = kStages_;            // stages of the ring
  static constexpr int kBlocksPerSm = kBlocksPerSm_;  // resident blocks that the register budget allows for
  static constexpr int kWarps = kWarpsN * kWarpsK;
  static constexpr int kThreads = 32 * kWarps;
  static_assert(kTokens % 8 == 0 && kTokens <= 32, "a lane holds the slot of one row");
  static_assert(kStages >= 2, "one stage is read while another is filled");
};

template <class T_, class Scale_, class Code_, int kK_, int kN_, int kExperts_, int kGroup_, int kSlotsPerRow_,
          bool kZeros_>
struct Problem {
  using T = T_;          // type of the activations
  using Scale = Scale_;  // type of the scales
  using Code = Code_;
  static constexpr int kK = kK_, kN = kN_, kExperts = kExperts_, kGroup = kGroup_;
  static constexpr int kSlotsPerRow = kSlotsPerRow_;  // slot s reads row s / kSlotsPerRow of x
  static constexpr bool kZeros = kZeros_;             // zero points per group, rather than baked into the code
};

template <class Problem, class Tile, class Routing, class Epilogue>
class GroupedGemm {
  using T = typename Problem::T;
  using Dequant = Dequantizer<typename Problem::Code, T>;

  static constexpr int kTileK = 16, kUnit = 64;  // Marlin's tile
  static constexpr int kWordsPerUnit = 128;      // 16 x 64 codes of 4 bits
  static constexpr int kSubTiles = kUnit / 16;   // MMA rows in a unit, one word of a lane each
  static constexpr int kTokenTiles = Tile::kTokens / 8;
  static constexpr int kShareK = Problem::kK / Tile::kWarpsK;
  static constexpr int kChunks = kShareK / Tile::kChunkK;
  static constexpr int kSteps = Tile::kChunkK / kTileK;
  static constexpr int kGroups = Problem::kK / Problem::kGroup;
  static constexpr int kScaleRows = Tile::kChunkK > Problem::kGroup ? Tile::kChunkK / Problem::kGroup : 1;
  static constexpr int kStepsPerScale = kSteps / kScaleRows;
  static constexpr int kCtaUnits = Tile::kWarpsN * Tile::kUnits;
  // A gated tile holds as many gate units as up units; its columns are those of the product.
  static constexpr int kOutputUnits = Epilogue::kGated ? kCtaUnits / 2 : kCtaUnits;
  static constexpr int kHalfN = Epilogue::kGated ? Problem::kN / 2 : Problem::kN;
  static constexpr int kColumnTiles = kHalfN / (kUnit * kOutputUnits);

  static_assert(Problem::kK % (Tile::kWarpsK * Tile::kChunkK) == 0, "every warp's share of K is whole chunks");
  static_assert(Problem::kGroup % Tile::kChunkK == 0 || Tile::kChunkK % Problem::kGroup == 0,
                "a chunk is part of one group, or whole groups");
  static_assert(kShareK % Problem::kGroup == 0 || Problem::kGroup >= Tile::kChunkK, "shares begin at a chunk");
  static_assert(!Epilogue::kGated || kCtaUnits % 2 == 0, "gate and up come in pairs");
  static_assert(kHalfN % (kUnit * kOutputUnits) == 0, "column tiles are whole");

  // One stage of a warp's ring.
  struct Stage {
    uint32_t weights[kSteps][Tile::kUnits][kWordsPerUnit];
    uint16_t tokens[Tile::kTokens * Tile::kChunkK];  // rows of kChunkK, 16-byte pieces swizzled
    uint16_t scales[kScaleRows][Tile::kUnits][kUnit];
    uint32_t zeros[Problem::kZeros ? kScaleRows : 1][Tile::kUnits][kUnit / 8];
  };
  static_assert(sizeof(Stage) % 16 == 0, "stages stay aligned for 16-byte copies");

  static constexpr int kFragments = kCtaUnits * kSubTiles * kTokenTiles;  // 16 x 8 sums each

  struct Shared {
    Stage ring[Tile::kWarps][Tile::kStages];
    float4 partials[Tile::kWarpsK][kFragments][32];
  };

 public:
  static constexpr int kSharedBytes = sizeof(Shared);
  static constexpr int kMaxTiles = Routing::kMaxBlocks * kColumnTiles;

  const uint16_t* __restrict__ x;         // [rows, K]
  const uint32_t* __restrict__ packed;    // [experts, K / 16, N * 2]
  const uint16_t* __restrict__ scales;    // [experts, groups, N] in Marlin order
  const uint32_t* __restrict__ zeros;     // [experts, groups, N / 8] in Marlin order, if kZeros
  Routing routing;
  Epilogue epilogue;

  __device__ void run(unsigned char* shared_bytes) const {
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_n = warp % Tile::kWarpsN, warp_k = warp / Tile::kWarpsN;
    Stage* ring = shared.ring[warp];

    if constexpr (Routing::kNeedsPreviousKernel) wait_for_previous_kernel();
    allow_next_kernel();
    const int tiles = routing.num_blocks() * kColumnTiles;

    Loader loader(*this, ring, warp_n, warp_k, lane, tiles);
    // Weights do not depend on the kernel before; tokens may.
    for (int s = 0; s < Tile::kStages - 1 && s < kChunks; ++s) loader.load_weights(s, s);
    if constexpr (!Routing::kNeedsPreviousKernel) wait_for_previous_kernel();
    for (int s = 0; s < Tile::kStages - 1; ++s) {
      if (s >= kChunks) loader.load_weights(s, 0);
      loader.load_tokens_and_advance(s);
      commit_copies();
    }

    int stage = 0;
    float sums[Tile::kUnits][kSubTiles][kTokenTiles][4];
    float group_sums[Tile::kUnits][kSubTiles][kTokenTiles][4];
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      clear(sums);
      clear(group_sums);
      const int first_k = warp_k * kShareK;
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        wait_copies<Tile::kStages - 2>();
        __syncwarp();
        int next = stage == 0 ? Tile::kStages - 1 : stage - 1;
        loader.load_weights(next, 0);
        loader.load_tokens_and_advance(next);
        commit_copies();
        bool closes_group = chunk == kChunks - 1 || (first_k + (chunk + 1) * Tile::kChunkK) % Problem::kGroup == 0;
        multiply(ring[stage], lane, closes_group, group_sums, sums);
        stage = stage == Tile::kStages - 1 ? 0 : stage + 1;
      }
      reduce_and_store(shared, tile, warp, warp_n, warp_k, lane, sums);
    }
    wait_copies<0>();
  }

 private:
  // Walks the (tile, chunk) sequence of one warp ahead of the multiplication and fills the ring.
  struct Loader {
    const GroupedGemm& gemm;
    Stage* ring;
    const int warp_n, warp_k, lane, tiles;
    const uint64_t policy = evict_first_policy();
    int tile, chunk = 0;
    int expert, row;            // of the tile being loaded; lane r holds row r of x
    int next_expert, next_row;  // of the tile after it, fetched ahead

    __device__ Loader(const GroupedGemm& g, Stage* r, int wn, int wk, int l, int t)
        : gemm(g), ring(r), warp_n(wn), warp_k(wk), lane(l), tiles(t), tile(blockIdx.x) {
      fetch(tile, expert, row);
      fetch(tile + gridDim.x, next_expert, next_row);
    }

    __device__ void fetch(int t, int& e, int& r) const {
      e = r = -1;
      if (t >= tiles) return;
      int block = t / kColumnTiles;
      e = gemm.routing.expert(block);
      if (lane < Tile::kTokens) {
        int slot = gemm.routing.slot(block, lane);
        r = slot < 0 ? -1 : slot / Problem::kSlotsPerRow;
      }
      if (!__any_sync(~0u, r >= 0)) e = -1;  // nothing but padding
    }

    // `ahead` chunks past the cursor, within its tile.
    __device__ void load_weights(int s, int ahead) const {
      if (expert < 0) return;
      const int c = chunk + ahead;
      Stage& stage = ring[s];
      const int k = warp_k * kShareK + c * Tile::kChunkK;
      const int column_tile = tile % kColumnTiles;
      const int group = k / Problem::kGroup;
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u) {
        const int unit = unit_index(column_tile, warp_n * Tile::kUnits + u);
        const uint32_t* source =
            gemm.packed + (int64_t(expert) * (Problem::kK / kTileK) + k / kTileK) * (Problem::kN * 2) +
            unit * kWordsPerUnit + lane * 4;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          copy16_streamed(&stage.weights[step][u][lane * 4], source + step * (Problem::kN * 2), policy);
        }
        const int64_t first_group = int64_t(expert) * kGroups + group;
        for (int piece = lane; piece < kScaleRows * 8; piece += 32) {
          copy16(&stage.scales[piece / 8][u][piece % 8 * 8],
                 gemm.scales + (first_group + piece / 8) * Problem::kN + unit * kUnit + piece % 8 * 8);
        }
        if constexpr (Problem::kZeros) {
          for (int piece = lane; piece < kScaleRows * 2; piece += 32) {
            copy16(&stage.zeros[piece / 2][u][piece % 2 * 4],
                   gemm.zeros + ((first_group + piece / 2) * Problem::kN + unit * kUnit) / 8 + piece % 2 * 4);
          }
        }
      }
    }

    __device__ void load_tokens_and_advance(int s) {
      if (expert >= 0) {
        constexpr int kPieces = Tile::kChunkK / 8;  // 16-byte pieces of a row
        const int k = warp_k * kShareK + chunk * Tile::kChunkK;
#pragma unroll
        for (int i = 0; i < Tile::kTokens * kPieces; i += 32) {
          const int piece = i + lane;
          const int r = piece / kPieces;
          const int source_row = __shfl_sync(~0u, row, r % 32);
          if (piece < Tile::kTokens * kPieces) {
            const uint16_t* source = gemm.x + int64_t(max(source_row, 0)) * Problem::kK + k + piece % kPieces * 8;
            copy16_or_zero(&ring[s].tokens[swizzled(r, piece % kPieces) * 8], source, source_row >= 0);
          }
        }
      }
      if (++chunk == kChunks) {
        chunk = 0;
        tile += gridDim.x;
        expert = next_expert;
        row = next_row;
        fetch(tile + gridDim.x, next_expert, next_row);
      }
    }
  };

  // The 64-column unit of the packed matrix that is number `u` of a column tile: gate units first, then up units.
  __device__ __forceinline__ static int unit_index(int column_tile, int u) {
    if constexpr (Epilogue::kGated) {
      const int half = u / kOutputUnits;
      return half * (kHalfN / kUnit) + column_tile * kOutputUnits + u % kOutputUnits;
    } else {
      return column_tile * kOutputUnits + u;
    }
  }

  // The 8 rows that ldmatrix reads at once fall into 8 different groups of 4 banks.
  __device__ __forceinline__ static int swizzled(int row, int piece) {
    constexpr int kPieces = Tile::kChunkK / 8;
    const int linear = row * kPieces + piece;
    return linear ^ ((kPieces > 8 ? row : linear / 8) % 8);
  }

  __device__ __forceinline__ static void clear(float (&sums)[Tile::kUnits][kSubTiles][kTokenTiles][4]) {
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u)
#pragma unroll
      for (int w = 0; w < kSubTiles; ++w)
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[u][w][t][i] = 0.0f;
  }

  __device__ __forceinline__ static void multiply(const Stage& stage, int lane, bool closes_group,
                                                  float (&group_sums)[Tile::kUnits][kSubTiles][kTokenTiles][4],
                                                  float (&sums)[Tile::kUnits][kSubTiles][kTokenTiles][4]) {
    const int column = lane / 4;  // this lane's columns are column + 8 j, j = 0..7
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int scale_row = step / kStepsPerScale;
      uint32_t b[kTokenTiles][2];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        load_matrices_x2(b[t], &stage.tokens[swizzled(t * 8 + lane % 8, step * 2 + lane / 8 % 2) * 8]);
      }
#pragma unroll
      for (int u = 0; u < Tile::kUnits; ++u) {
        const uint4 words = *reinterpret_cast<const uint4*>(&stage.weights[step][u][lane * 4]);
        const uint32_t word[kSubTiles] = {words.x, words.y, words.z, words.w};
        const uint32_t zero_word = Problem::kZeros ? stage.zeros[scale_row][u][column] : 0;
#pragma unroll
        for (int w = 0; w < kSubTiles; ++w) {
          typename Dequant::Zero low, high;
          if constexpr (Problem::kZeros) {
            low = Dequant::zero(zero_of_column(zero_word, 2 * w));
            high = Dequant::zero(zero_of_column(zero_word, 2 * w + 1));
          } else {
            low = high = Dequant::zero(Problem::Code::kBakedZero);
          }
          uint32_t a[4];
          Dequant::fragment(word[w], low, high, a);
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) mma_16x8x16<T>(group_sums[u][w][t], a, b[t]);
        }
      }
      if (step % kStepsPerScale == kStepsPerScale - 1 && (kScaleRows > 1 || closes_group)) {
        scale(stage, scale_row, column, group_sums, sums);
      }
    }
  }

  // sums += group_sums * scale, and a fresh start for the next group.
  __device__ __forceinline__ static void scale(const Stage& stage, int scale_row, int column,
                                               float (&group_sums)[Tile::kUnits][kSubTiles][kTokenTiles][4],
                                               float (&sums)[Tile::kUnits][kSubTiles][kTokenTiles][4]) {
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u) {
      const uint4 packed_scales = *reinterpret_cast<const uint4*>(&stage.scales[scale_row][u][column * 8]);
      const uint32_t pairs[4] = {packed_scales.x, packed_scales.y, packed_scales.z, packed_scales.w};
#pragma unroll
      for (int w = 0; w < kSubTiles; ++w) {
        const float low = to_float<typename Problem::Scale>(static_cast<uint16_t>(pairs[w]));
        const float high = to_float<typename Problem::Scale>(static_cast<uint16_t>(pairs[w] >> 16));
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[u][w][t][i] += group_sums[u][w][t][i] * (i < 2 ? low : high);
            group_sums[u][w][t][i] = 0.0f;
          }
        }
      }
    }
  }

  // Adds the shares of K in a fixed order and hands each sum to the epilogue.
  __device__ void reduce_and_store(Shared& shared, int tile, int warp, int warp_n, int warp_k, int lane,
                                   const float (&sums)[Tile::kUnits][kSubTiles][kTokenTiles][4]) const {
    const int block = tile / kColumnTiles, column_tile = tile % kColumnTiles;
    const int expert = routing.expert(block);
    __syncthreads();  // the partials of the tile before have been read
#pragma unroll
    for (int u = 0; u < Tile::kUnits; ++u) {
#pragma unroll
      for (int w = 0; w < kSubTiles; ++w) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          const int fragment = ((warp_n * Tile::kUnits + u) * kSubTiles + w) * kTokenTiles + t;
          const float(&s)[4] = sums[u][w][t];
          shared.partials[warp_k][fragment][lane] = float4{s[0], s[1], s[2], s[3]};
        }
      }
    }
    __syncthreads();
    if (expert < 0) return;
    constexpr int kOutputFragments = kOutputUnits * kSubTiles * kTokenTiles;
    for (int f = warp; f < kOutputFragments; f += Tile::kWarps) {
      const float4 first = add_shares(shared, f, lane);
      const float4 second = Epilogue::kGated ? add_shares(shared, f + kOutputFragments, lane) : float4{};
      const int t = f % kTokenTiles, sub_tile = f / kTokenTiles;  // 16 columns each
      const int column = (column_tile * kOutputUnits * kSubTiles + sub_tile) * 16 + lane / 4;
      const int even = routing.slot(block, t * 8 + lane % 4 * 2);
      const int odd = routing.slot(block, t * 8 + lane % 4 * 2 + 1);
      if (even >= 0) {
        epilogue.store(expert, even, column, first.x, second.x);
        epilogue.store(expert, even, column + 8, first.z, second.z);
      }
      if (odd >= 0) {
        epilogue.store(expert, odd, column, first.y, second.y);
        epilogue.store(expert, odd, column + 8, first.w, second.w);
      }
    }
  }

  __device__ __forceinline__ static float4 add_shares(const Shared& shared, int fragment, int lane) {
    float4 sum = shared.partials[0][fragment][lane];
#pragma unroll
    for (int k = 1; k < Tile::kWarpsK; ++k) {
      const float4 part = shared.partials[k][fragment][lane];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    return sum;
  }
};

}  // namespace jmm
