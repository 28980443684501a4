// The last step of a block: sums each token's slots in ascending order, adds what experts without weights return, their
// input, and rounds once.
#pragma once

#include "four_columns.cuh"
#include "offsets.cuh"
#include "ptx/memory.cuh"
#include "ptx/numbers.cuh"
#include "ptx/synchronization.cuh"
#include "token_count.cuh"
#include "token_tiles/aligned.cuh"
#include "token_tiles/expert_of_slot.cuh"

namespace jmm {

// Which slots of a token have an expert with weights, a bit each. Facts of all: jax_marlin_moe/cuda/kernels/combine.py.
template <class Facts>
struct SlotsWithRows {
  uint32_t bits[(Facts::kTopK + 31) / 32] = {};

  __device__ __forceinline__ SlotsWithRows(const int32_t* topk_ids, const int32_t* expert_map, int token) {
#pragma unroll
    for (int j = 0; j < Facts::kTopK; ++j) {
      const int expert = expert_of_slot<Facts::kExperts, Facts::kRoutedExperts, Facts::kMapped>(
          topk_ids, expert_map, token * Facts::kTopK + j);
      bits[j / 32] |= uint32_t(expert >= 0) << (j % 32);
    }
  }
  __device__ __forceinline__ bool has(int j) const { return bits[j / 32] >> (j % 32) & 1; }
};

template <class Facts>
struct Combine {
  using T = typename Facts::Element;        // of the result; int32_t for `FourColumns` of neighbours
  using X = typename Facts::Input;          // of x
  using Partial = typename Facts::Partial;  // of the rows that are added
  static constexpr int kTokens = Facts::kTokens, kTopK = Facts::kTopK;
  static constexpr int kColumns = Facts::kColumns;              // that are added: of the rows of partials
  static constexpr int kResultColumns = Facts::kResultColumns;  // from one row of the result to the next
  static constexpr int kExperts = Facts::kExperts;              // of the matrices
  static constexpr int kRoutedExperts = Facts::kRoutedExperts;  // that topk_ids may name
  static constexpr bool kMapped = Facts::kMapped;               // whether there is an expert_map
  // Experts from kRoutedExperts on that return their input, of which there are kInputColumns.
  static constexpr int kIdentityExperts = Facts::kIdentityExperts, kInputColumns = Facts::kInputColumns;
  // Whether the partials of each 64 columns are in the order of a unit's scales: r, r + 8, r + 16 ... for r below 8.
  static constexpr bool kPlaces = Facts::kPlaces;
  static constexpr int kThreads = 128;                  // small: they move in beside the CTAs of the kernel before
  static constexpr int kVector = 16 / sizeof(Partial);  // columns of a thread: one 16-byte load a slot
  static constexpr int kFours = kVector / 4;
  static constexpr int kVectors = kColumns / kVector;  // of a row
  static constexpr int64_t kAllVectors = int64_t(kTokens) * kVectors;
  static constexpr int64_t kMaxCtas = (kAllVectors + kThreads - 1) / kThreads;
  using VectorIndex = Index<kAllVectors + kThreads>;
  static_assert(kColumns % kVector == 0 && kInputColumns % kVector == 0, "rows are whole vectors");
  // A slice of the columns: another slice's rows were in the same memory, and an old line of them may be in L1.
  static constexpr bool kSliced = kColumns != kResultColumns;
  static constexpr int kAhead = kSliced && kTopK > 1 ? (kTopK < 8 ? kTopK : 8) : 1;  // loads on their way at a time
  static_assert(kIdentityExperts == 0 || (!kSliced && kFours == 1), "their input is added to whole rows, by fours");
  static_assert(!kPlaces || (kColumns % 64 == 0 && kFours == 1 && kIdentityExperts == 0), "whole units, by fours");

  // [kTokens * kTopK, kColumns]; rows of dropped slots hold nothing.
  const Partial* __restrict__ partials;
  const int32_t* __restrict__ topk_ids;    // [kTokens, kTopK]
  const int32_t* __restrict__ expert_map;  // [kRoutedExperts] if kMapped
  // If there are identity experts: the layer's input, and the slots' weights, from a kernel of this call.
  const X* __restrict__ x;    // [kTokens, kInputColumns]
  const float* topk_weights;  // [kTokens, kTopK]
  T* __restrict__ out;        // [kTokens, kResultColumns], from the first of the columns on; half of it as int32_t
  [[no_unique_address]] TokenCount<Facts::kCounted> count;

  __device__ void run() const {
    const VectorIndex i = Offset<kAllVectors + kThreads>(blockIdx.x) * kThreads + threadIdx.x;
    const int last = count.of(kTokens) - 1, token = min(i / kVectors, VectorIndex(last)), vector = i % kVectors;
    // The ids were there before this call: they are fetched while the kernel before still runs.
    const SlotsWithRows<Facts> slots(topk_ids, expert_map, token);
    allow_next_kernel();
    wait_for_previous_kernel();
    if (!kPlaces && i >= VectorIndex(count.of(kTokens)) * kVectors) return;  // with places, the others of a unit wait
    float4 sums[kFours] = {};
#pragma unroll
    for (int first = 0; first < kTopK; first += kAhead) {
      if constexpr (kAhead == 1) {
        if (slots.has(first)) add_words(sums, partial(token * kTopK + first, vector));
        continue;
      }
      uint4 words[kAhead];
#pragma unroll
      for (int j = first; j < first + kAhead && j < kTopK; ++j) {
        if (slots.has(j)) words[j - first] = partial(token * kTopK + j, vector);
      }
#pragma unroll
      for (int j = first; j < first + kAhead && j < kTopK; ++j) {
        if (slots.has(j)) add_words(sums, words[j - first]);
      }
    }
    if constexpr (kIdentityExperts > 0) add_input(sums[0], token, vector);
    if constexpr (kPlaces) {
      sums[0] = in_order(sums[0]);
      if (i >= VectorIndex(count.of(kTokens)) * kVectors) return;
    }
    const int64_t place = kSliced ? int64_t(token) * (kResultColumns / kVector) + vector : int64_t(i);
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      const float4 sum = sums[f];
      if constexpr (kSame<T, float>) {
        reinterpret_cast<float4*>(out)[place * kFours + f] = sum;
      } else if constexpr (kSame<T, int32_t>) {
        reinterpret_cast<uint2*>(out)[place * kFours + f] = FourColumns::pack(sum.x, sum.y, sum.z, sum.w);
      } else {
        reinterpret_cast<uint2*>(out)[place * kFours + f] =
            uint2{from_float<T>(sum.x) | uint32_t(from_float<T>(sum.y)) << 16,
                  from_float<T>(sum.z) | uint32_t(from_float<T>(sum.w)) << 16};
      }
    }
  }

 private:
  // From four places to four columns: sixteen threads have a unit, and a warp two of them.
  __device__ __forceinline__ static float4 in_order(const float4& places) {
    __shared__ float units[kThreads / 16][64 + 16];
    const int v = threadIdx.x % 16, r = v / 2, first = v % 2 * 4;
    float (&unit)[64 + 16] = units[threadIdx.x / 16];
    unit[8 * first + r] = places.x, unit[8 * first + 8 + r] = places.y;
    unit[8 * first + 16 + r] = places.z, unit[8 * first + 24 + r] = places.w;
    __syncwarp();
    return *reinterpret_cast<const float4*>(&unit[4 * v]);
  }

  // A vector of a slot's row.
  __device__ __forceinline__ uint4 partial(int slot, int vector) const {
    const uint4* source = reinterpret_cast<const uint4*>(partials) + (int64_t(slot) * kVectors + vector);
    return kSliced ? load_from_l2(source) : *source;
  }
  __device__ __forceinline__ static void add_words(float4 (&sums)[kFours], const uint4& words) {
    if constexpr (kFours == 1) {
      add(sums[0], __uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
          __uint_as_float(words.w));
    } else {
      add(sums[0], low(words.x), high(words.x), low(words.y), high(words.y));
      add(sums[1], low(words.z), high(words.z), low(words.w), high(words.w));
    }
  }
  __device__ __forceinline__ static void add(float4& sum, float x, float y, float z, float w) {
    sum.x += x, sum.y += y, sum.z += z, sum.w += w;
  }
  __device__ __forceinline__ static float low(uint32_t pair) { return to_float<Partial>(static_cast<uint16_t>(pair)); }
  __device__ __forceinline__ static float high(uint32_t pair) {
    return to_float<Partial>(static_cast<uint16_t>(pair >> 16));
  }

  // A vector of the token's input, times the weights of the identity experts that it has chosen.
  __device__ __forceinline__ void add_input(float4& sum, int token, int vector) const {
    constexpr int kInputVectors = kInputColumns / kVector;
    float weight = 0.0f;
#pragma unroll
    for (int j = 0; j < kTopK; ++j) {
      const int expert = topk_ids[token * kTopK + j];
      if (expert >= kRoutedExperts && expert < kRoutedExperts + kIdentityExperts)
        weight += topk_weights[token * kTopK + j];
    }
    if (vector >= kInputVectors) return;
    const uint2 pairs = reinterpret_cast<const uint2*>(x)[int64_t(token) * kInputVectors + vector];
    sum.x = fmaf(to_float<X>(static_cast<uint16_t>(pairs.x)), weight, sum.x);
    sum.y = fmaf(to_float<X>(static_cast<uint16_t>(pairs.x >> 16)), weight, sum.y);
    sum.z = fmaf(to_float<X>(static_cast<uint16_t>(pairs.y)), weight, sum.z);
    sum.w = fmaf(to_float<X>(static_cast<uint16_t>(pairs.y >> 16)), weight, sum.w);
  }
};

// The same of rows of `FourColumns`. A thread has two vectors of four columns each: 16 bytes of a slot.
template <class Facts>
struct CombineFourColumns {
  using T = typename Facts::Element;  // of the result; int32_t for `FourColumns` of neighbours
  static constexpr int kTokens = Facts::kTokens, kTopK = Facts::kTopK, kColumns = Facts::kColumns;
  static constexpr int kExperts = Facts::kExperts, kRoutedExperts = Facts::kRoutedExperts;
  static constexpr bool kMapped = Facts::kMapped, kPairs = Facts::kPairs;
  using Places = PlacesOfFour<kPairs>;
  static constexpr int kThreads = 128;
  static constexpr int kPieces = kColumns / 8;  // of a row
  static constexpr int64_t kAllPieces = int64_t(kTokens) * kPieces;
  static constexpr int64_t kMaxCtas = (kAllPieces + kThreads - 1) / kThreads;
  using PieceIndex = Index<kAllPieces + kThreads>;
  static_assert(kColumns % Places::kGroup == 0, "rows are whole groups of columns");

  const float* __restrict__ partials;      // [kTokens * kTopK, kPieces] of uint4; rows of dropped slots hold nothing
  const int32_t* __restrict__ topk_ids;    // [kTokens, kTopK]
  const int32_t* __restrict__ expert_map;  // [kRoutedExperts] if kMapped
  T* __restrict__ out;                     // [kTokens, kColumns], half of it as int32_t
  [[no_unique_address]] TokenCount<Facts::kCounted> count;

  __device__ void run() const {
    const PieceIndex i = Offset<kAllPieces + kThreads>(blockIdx.x) * kThreads + threadIdx.x;
    const int last = count.of(kTokens) - 1, token = min(i / kPieces, PieceIndex(last)), piece = i % kPieces;
    const SlotsWithRows<Facts> slots(topk_ids, expert_map, token);
    allow_next_kernel();
    wait_for_previous_kernel();
    if (i >= PieceIndex(count.of(kTokens)) * kPieces) return;
    float4 sums[2] = {};
#pragma unroll
    for (int j = 0; j < kTopK; ++j) {
      if (!slots.has(j)) continue;
      const uint4 part = reinterpret_cast<const uint4*>(partials)[int64_t(token * kTopK + j) * kPieces + piece];
      FourColumns::add(sums[0], uint2{part.x, part.y});
      FourColumns::add(sums[1], uint2{part.z, part.w});
    }
    if constexpr (kSame<T, int32_t>) {
      store_packed(sums, token, piece);
    } else {
      store(sums, token, piece);
    }
  }

 private:
  __device__ __forceinline__ void store(const float4 (&sums)[2], int token, int piece) const {
    // The columns of the second vector are next to those of the first.
    T* const to = out + int64_t(token) * kColumns + Places::column_of(2 * piece);
    if constexpr (kSame<T, float>) {
      if constexpr (kPairs) {
        *reinterpret_cast<float4*>(to) = float4{sums[0].x, sums[0].y, sums[1].x, sums[1].y};
        *reinterpret_cast<float4*>(to + 8) = float4{sums[0].z, sums[0].w, sums[1].z, sums[1].w};
      } else {
        *reinterpret_cast<float2*>(to) = float2{sums[0].x, sums[1].x};
        *reinterpret_cast<float2*>(to + 8) = float2{sums[0].y, sums[1].y};
        *reinterpret_cast<float2*>(to + 16) = float2{sums[0].z, sums[1].z};
        *reinterpret_cast<float2*>(to + 24) = float2{sums[0].w, sums[1].w};
      }
    } else if constexpr (kPairs) {
      *reinterpret_cast<uint2*>(to) = uint2{both(sums[0].x, sums[0].y), both(sums[1].x, sums[1].y)};
      *reinterpret_cast<uint2*>(to + 8) = uint2{both(sums[0].z, sums[0].w), both(sums[1].z, sums[1].w)};
    } else {
      *reinterpret_cast<uint32_t*>(to) = both(sums[0].x, sums[1].x);
      *reinterpret_cast<uint32_t*>(to + 8) = both(sums[0].y, sums[1].y);
      *reinterpret_cast<uint32_t*>(to + 16) = both(sums[0].z, sums[1].z);
      *reinterpret_cast<uint32_t*>(to + 24) = both(sums[0].w, sums[1].w);
    }
  }

  __device__ __forceinline__ static uint32_t both(float first, float second) {
    return from_float<T>(first) | uint32_t(from_float<T>(second)) << 16;
  }

  // Two vectors of four neighbours each, eight columns apart.
  __device__ __forceinline__ void store_packed(const float4 (&sums)[2], int token, int piece) const {
    float4 first, second;
    int column = Places::column_of(2 * piece);
    if constexpr (kPairs) {
      first = float4{sums[0].x, sums[0].y, sums[1].x, sums[1].y};
      second = float4{sums[0].z, sums[0].w, sums[1].z, sums[1].w};
    } else {
      // Two threads have 16 columns' pairs: the even one stores the first half of their 32, the odd one the second.
      const bool odd = piece % 2;
      const float4 sent =
          odd ? float4{sums[0].x, sums[1].x, sums[0].y, sums[1].y} : float4{sums[0].z, sums[1].z, sums[0].w, sums[1].w};
      const uint32_t pair = 3u << (threadIdx.x % 32 & ~1);
      const float4 got = {__shfl_xor_sync(pair, sent.x, 1), __shfl_xor_sync(pair, sent.y, 1),
                          __shfl_xor_sync(pair, sent.z, 1), __shfl_xor_sync(pair, sent.w, 1)};
      first = odd ? float4{got.x, got.y, sums[0].z, sums[1].z} : float4{sums[0].x, sums[1].x, got.x, got.y};
      second = odd ? float4{got.z, got.w, sums[0].w, sums[1].w} : float4{sums[0].y, sums[1].y, got.z, got.w};
      column += odd ? 16 - 2 : 0;
    }
    uint2* const to = reinterpret_cast<uint2*>(out) + (int64_t(token) * kColumns + column) / 4;
    to[0] = FourColumns::pack(first.x, first.y, first.z, first.w);
    to[2] = FourColumns::pack(second.x, second.y, second.z, second.w);
  }
};

// Rows that no block lists are zero: the output is cleared before the product writes into it. No row of the list is
// known yet to be its slot's first.
template <class Facts>
struct Clear {
  using T = typename Facts::Element;  // of the result
  static constexpr int kSlots = Facts::kSlots, kColumns = Facts::kColumns;
  static constexpr int kThreads = 256;
  static constexpr int64_t kBytes = int64_t(kSlots) * kColumns * sizeof(T);
  static constexpr int64_t kPieces = kBytes / 16;
  static constexpr int64_t kMaxCtas = (kPieces + kThreads - 1) / kThreads;
  using PieceIndex = Index<kPieces + kThreads>;
  static_assert(kBytes % 16 == 0, "cleared in 16-byte stores");
  static_assert(kPieces >= kSlots, "a thread has one slot at most");

  T* __restrict__ out;               // [kSlots, kColumns]
  int32_t* __restrict__ first_rows;  // [kSlots]

  __device__ void run() const {
    const PieceIndex i = Offset<kPieces + kThreads>(blockIdx.x) * kThreads + threadIdx.x;
    wait_for_previous_kernel();
    allow_next_kernel();
    if (i < kPieces) reinterpret_cast<int4*>(out)[i] = int4{0, 0, 0, 0};
    if (i < kSlots) first_rows[i] = kNoRow;
  }
};

// Where the list has each slot first, in a block with an expert. A list that was made by hand may have a slot again:
// the first one counts.
template <class Facts>
struct FindFirstRows {
  static constexpr int kSlots = Facts::kSlots, kExperts = Facts::kExperts;
  static constexpr int kListBlock = Facts::kListBlock, kListLength = Facts::kListLength;
  static constexpr int kThreads = 256;
  static constexpr int kMaxCtas = kListLength > 0 ? (kListLength + kThreads - 1) / kThreads : 1;

  const int32_t* __restrict__ sorted_token_ids;        // [kListLength]
  const int32_t* __restrict__ expert_ids;              // [ceil(kListLength / kListBlock)]
  const int32_t* __restrict__ num_tokens_post_padded;  // [1]
  int32_t* __restrict__ first_rows;                    // [kSlots], of kNoRow

  __device__ void run() const {
    const int row = blockIdx.x * kThreads + threadIdx.x;
    const bool listed = row < min(kListLength, *num_tokens_post_padded);
    const int slot = listed ? sorted_token_ids[row] : -1, expert = listed ? expert_ids[row / kListBlock] : -1;
    allow_next_kernel();
    wait_for_previous_kernel();
    if (slot >= 0 && slot < kSlots && expert >= 0 && expert < kExperts) atomicMin(&first_rows[slot], row);
  }
};

}  // namespace jmm
