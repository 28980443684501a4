// Rows of x to 8 bits (docs/formats.md, "8-bit activations"): with a scale for each row or for each 128 columns of it,
// by one scale that is given, or as they are, where they are in units of a scale already.
//
// A row of the result is kColumns bytes, permuted within each 32 as the packed codes are (weights/fragments_bytes.cuh).
// Where the product multiplies 16 bits (kWide), the codes' values are stored as numbers of x's type, in order.
// Behind them are, if kSums, the sums of each 128 columns' values, by which zero points leave the products: two
// bfloat16 numbers each, of 16 sums all high parts and then all low ones.
#pragma once

#include "intermediate.cuh"
#include "offsets.cuh"
#include "ptx/numbers.cuh"
#include "ptx/synchronization.cuh"

namespace jmm {

// Facts: jax_marlin_moe/cuda/kernels/quantize_rows.py.
template <class Facts>
struct QuantizeRows {
  using T = typename Facts::Element;  // of x
  using Byte = typename Facts::Byte;  // Fp8 or Signed8
  static constexpr bool kWide = Facts::kWide;
  using Stored = typename Select<kWide, T, Byte>::Type;
  static constexpr int kRows = Facts::kRows, kColumns = Facts::kColumns;
  static constexpr bool kHalvesApart = Facts::kHalvesApart;   // which of the two orders a fragment's bytes have
  static constexpr int kSourceStride = Facts::kSourceStride;  // elements from a row of x to the next
  static constexpr int kStride = Facts::kStride;              // elements from a row of the result to the next
  static constexpr bool kSums = Facts::kSums;
  // Whether x has the columns of each 64 in the order of a unit's scales: r, r + 8, r + 16 ... for r below 8.
  static constexpr bool kPlaces = Facts::kPlaces;
  static constexpr int kSumCount = (kColumns + 127) / 128, kSumPlaces = (kSumCount + 15) / 16 * 16;
  static constexpr bool kGroups = Facts::kGroups;  // whether each 128 columns have a scale, which ends the row
  static constexpr int kSumBytes = kSums ? 4 * kSumPlaces : 0;
  static_assert(kStride == kColumns + kSumBytes + (kGroups ? (4 * kSumCount + 15) / 16 * 16 : 0),
                "a row, its sums, its scales");
  static_assert(!kGroups || !(kWide || Facts::kFixed || Facts::kInUnits), "scales of groups are those of bytes");
  static_assert(!kWide || !(kSums || kPlaces || Facts::kInUnits), "products of 16 bits need neither");
  static constexpr int kThreads = 128;
  static constexpr int kPieces = kPlaces ? (kColumns + 63) / 64 * 8 : kColumns / 8;  // of eight columns
  static constexpr int kRowThreads = kColumns > 8192 ? 128 : kColumns > 4096 ? 64 : 32;
  static constexpr int kCtaRows = kThreads / kRowThreads;
  static constexpr int kRounds = (kPieces + kRowThreads - 1) / kRowThreads;
  static constexpr int64_t kMaxCtas = (kRows + kCtaRows - 1) / kCtaRows;
  static constexpr float kLargest = kSame<Byte, Fp8> ? 448.0f : 127.0f;
  static constexpr bool kFixed = Facts::kFixed;      // whether there is a scale of all rows
  static constexpr bool kInUnits = Facts::kInUnits;  // whether there is none to find, nor to write
  static_assert(kColumns % (kWide ? 8 : 32) == 0, "whole pieces, and fragments");
  static_assert(!(kFixed && kInUnits), "one or the other");
  // Integers have no NaN: with a scale that is fixed, a row with one has NaN for its own, and one in units else.
  static constexpr bool kMarks = !kSame<Byte, Fp8> && (kFixed || kInUnits);
  static_assert(kPieces * 8 <= kSourceStride, "a row of x has them");

  const T* __restrict__ x;          // [kRows, kSourceStride]
  const float* __restrict__ fixed;  // [1] if kFixed
  Stored* __restrict__ bytes;       // [kRows, kStride]
  float* __restrict__ scales;       // [kRows] unless kGroups, or kInUnits of e4m3

  __device__ void run() const {
    const int lane = threadIdx.x % kRowThreads;
    const int64_t row = int64_t(blockIdx.x) * kCtaRows + threadIdx.x / kRowThreads;
    const bool real = row < kRows;
    if constexpr (Facts::kFromPreviousKernel) wait_for_previous_kernel();
    allow_next_kernel();

    uint4 pieces[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int piece = i * kRowThreads + lane;
      pieces[i] = uint4{0, 0, 0, 0};
      if (real && piece < kPieces) pieces[i] = reinterpret_cast<const uint4*>(x + row * kSourceStride)[piece];
    }
    float factor = 1.0f;  // of values, or what they are divided by
    if constexpr (kFixed) {
      factor = usable_scale(fixed[0]);
      if constexpr (!kMarks) {
        if (real && lane == 0) scales[row] = factor;
      }
    } else if constexpr (!kInUnits && !kGroups) {
      const float largest = largest_of_row(pieces);
      factor = __fdiv_rn(kLargest, largest);
      if (real && lane == 0) scales[row] = __fmul_rn(largest, 1.0f / kLargest);
    }
    if constexpr (kMarks) {
      const float largest = largest_of_row(pieces);
      if (real && lane == 0) scales[row] = largest == largest || factor == 0.0f ? factor : largest;
    }

    unsigned char* const out = reinterpret_cast<unsigned char*>(bytes + row * kStride);
    if constexpr (kWide) {
      store_values(reinterpret_cast<uint4*>(out), pieces, factor, lane, real);
    } else {
      store_bytes(out, pieces, factor, lane, real);
    }
    // Rows that were there before this call: the next kernel, which waits for this one, reads what the one before
    // wrote.
    if constexpr (!Facts::kFromPreviousKernel) wait_for_previous_kernel();
  }

 private:
  // The row's bytes and the sums behind them.
  __device__ __forceinline__ static void store_bytes(unsigned char* out, const uint4 (&pieces)[kRounds], float factor,
                                                     int lane, bool real) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int piece = i * kRowThreads + lane;
      const uint32_t pairs[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
      float scale = 1.0f;
      if constexpr (kGroups) {
        uint32_t extent = extent_of(pieces[i]);
#pragma unroll
        for (int step = 1; step < 16; step *= 2) extent = max(extent, __shfl_xor_sync(~0u, extent, step));
        const float largest = at_least_normal(extent);
        factor = __fdiv_rn(kLargest, largest), scale = __fmul_rn(largest, 1.0f / kLargest);
        if (real && piece < kPieces && piece % 16 == 0) {
          reinterpret_cast<float*>(out + kColumns + kSumBytes)[piece / 16] = scale;
        }
      }
      uint32_t codes[2] = {};  // of the piece, in its order
      float sum = 0.0f;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float first = scaled(static_cast<uint16_t>(pairs[q]), factor);
        const float second = scaled(static_cast<uint16_t>(pairs[q] >> 16), factor);
        codes[q / 2] |= quantized_pair<Byte>(first, second, sum) << 16 * (q % 2);
      }
      store_codes(out, piece, codes, real && piece < kPieces);
      if constexpr (kSums) {
#pragma unroll
        for (int step = 1; step < 16; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (real && piece < kPieces && piece % 16 == 0) store_sum(out + kColumns, piece / 16, sum * scale);
      }
    }
    if constexpr (kSums) {
      for (int i = kSumCount + lane; real && i < kSumPlaces; i += kRowThreads) store_sum(out + kColumns, i, 0.0f);
    }
  }

  // The values of the row's codes as numbers of x's type, which has them all.
  __device__ __forceinline__ static void store_values(uint4* out, const uint4 (&pieces)[kRounds], float factor,
                                                      int lane, bool real) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int piece = i * kRowThreads + lane;
      const uint32_t pairs[4] = {pieces[i].x, pieces[i].y, pieces[i].z, pieces[i].w};
      uint32_t values[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        values[q] = value_bits(scaled(static_cast<uint16_t>(pairs[q]), factor)) |
                    value_bits(scaled(static_cast<uint16_t>(pairs[q] >> 16), factor)) << 16;
      }
      if (real && piece < kPieces) out[piece] = uint4{values[0], values[1], values[2], values[3]};
    }
  }
  __device__ __forceinline__ static uint32_t value_bits(float value) {
    return from_float<T>(kSame<Byte, Fp8> ? nearest_e4m3(value) : nearest_integer(value));
  }
  __device__ __forceinline__ static float nearest_integer(float value) {
    return fminf(fmaxf(rintf(value), -127.0f), 127.0f);
  }

  __device__ __forceinline__ static float scaled(uint16_t bits, float factor) {
    const float value = to_float<T>(bits);
    if constexpr (kFixed) return factor == 0.0f ? 0.0f : __fdiv_rn(value, factor);
    return kInUnits ? value : value * factor;
  }

  // The largest magnitude of the row, at least 2^-100, so that its inverse is finite. Of bits: NaN is the largest.
  __device__ __forceinline__ static float largest_of_row(const uint4 (&pieces)[kRounds]) {
    uint32_t extent = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) extent = max(extent, extent_of(pieces[i]));
    extent = maximum_of_warp(extent);
    if constexpr (kRowThreads > 32) {
      __shared__ uint32_t extents[kThreads / 32];
      if (threadIdx.x % 32 == 0) extents[threadIdx.x / 32] = extent;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kRowThreads / 32; ++w) {
        extent = max(extent, extents[threadIdx.x / kRowThreads * (kRowThreads / 32) + w]);
      }
    }
    return at_least_normal(extent);
  }
  __device__ __forceinline__ static uint32_t extent_of(const uint4& piece) {
    uint32_t extent = 0;
    for (const uint32_t pair : {piece.x, piece.y, piece.z, piece.w}) {
      extent = max(extent, max(pair & 0x7FFFu, pair >> 16 & 0x7FFFu));
    }
    return extent;
  }
  __device__ __forceinline__ static float at_least_normal(uint32_t extent) {
    const float least = __uint_as_float((127 - 100) << 23), largest = to_float<T>(static_cast<uint16_t>(extent));
    return largest < least ? least : largest;
  }

  // Column 32 c + 16 s + 8 h + 2 t + i goes to the byte 32 c + 16 h + 4 t + 2 s + i where halves are apart, else to
  // 32 c + 16 s + 4 t + 2 i + h: a word has codes of two lanes. The two exchange halves of theirs.
  __device__ __forceinline__ static void store_codes(unsigned char* out, int piece, const uint32_t (&codes)[2],
                                                     bool stores) {
    // A piece in order is (c, s, h), and its codes (t, i); else it is (t, i), and its codes (c, s, h).
    constexpr int kOther = !kPlaces && kHalvesApart ? 2 : 1;
    const int side = piece / kOther % 2;
    const uint32_t mine = side ? codes[1] : codes[0];
    const uint32_t other = __shfl_xor_sync(~0u, side ? codes[0] : codes[1], kOther);
    const uint32_t low = side ? other : mine, high = side ? mine : other;
    if (!stores) return;
    if constexpr (kPlaces) {
      const int column = piece / 8 * 64 + 32 * side, t = piece % 8 / 2;
      if (column >= kColumns) return;  // half a unit is the rest
      uint32_t* words = reinterpret_cast<uint32_t*>(out + column) + t;
      words[0] = __byte_perm(low, high, kHalvesApart ? 0x6240 : 0x5410);
      words[4] = __byte_perm(low, high, kHalvesApart ? 0x7351 : 0x7632);
    } else {
      const int c = piece / 4, s = piece / 2 % 2, h = piece % 2;
      *reinterpret_cast<uint2*>(out + 32 * c + (kHalvesApart ? 16 * h + 8 * s : 16 * s + 8 * h)) =
          uint2{__byte_perm(low, high, kHalvesApart ? 0x5410 : 0x5140),
                __byte_perm(low, high, kHalvesApart ? 0x7632 : 0x7362)};
    }
  }

  __device__ __forceinline__ static void store_sum(unsigned char* tail, int i, float sum) {
    const uint16_t high = from_float<BFloat>(sum), low = from_float<BFloat>(sum - to_float<BFloat>(high));
    uint16_t* place = reinterpret_cast<uint16_t*>(tail + i / 16 * 64) + i % 16;
    place[0] = high, place[16] = low;
  }

  // Two codes, the first in the low byte; their values are added to `sum`.
  template <class B>
  __device__ __forceinline__ static uint32_t quantized_pair(float first, float second, float& sum) {
    if constexpr (kSame<B, Fp8>) {
      const uint16_t codes = e4m3_pair(first, second);
      const uint32_t values = halves_of_e4m3_pair(codes);
      sum += to_float<Half>(static_cast<uint16_t>(values)) + to_float<Half>(static_cast<uint16_t>(values >> 16));
      return codes;
    } else {
      const float a = nearest_integer(first), b = nearest_integer(second);
      sum += a + b;
      return (static_cast<int>(a) & 0xFF) | (static_cast<int>(b) & 0xFF) << 8;
    }
  }
};

}  // namespace jmm
