// Rows of x to 8 bits, with a scale for each row (docs/formats.md, "8-bit activations").
//
// A row of the result is kColumns bytes, permuted within each 32 as the packed codes are (weights/fragments_bytes.cuh).
// Behind them are, if kSums, the sums of each 128 columns' values, by which zero points leave the products: two
// bfloat16 numbers each, in chunks of 16 as mma_16x8x16 has them. A lane's 16 bytes are those of sums 2 t, 2 t + 1,
// 2 t + 8 and 2 t + 9 of a chunk, high parts first.
#pragma once

#include "offsets.cuh"
#include "ptx/hopper.cuh"

namespace jmm {

// Facts: jax_marlin_moe/cuda/kernels/quantize_rows.py.
template <class Facts>
struct QuantizeRows {
  using T = typename Facts::Element;  // of x
  using Byte = typename Facts::Byte;  // Fp8 or Signed8
  static constexpr int kRows = Facts::kRows, kColumns = Facts::kColumns;
  static constexpr int kCodeBits = Facts::kCodeBits;          // of the weights: 4 or 8
  static constexpr int kSourceStride = Facts::kSourceStride;  // elements from a row of x to the next
  static constexpr int kStride = Facts::kStride;              // bytes from a row of the result to the next
  static constexpr bool kSums = Facts::kSums;
  static constexpr int kSumCount = (kColumns + 127) / 128, kSumPlaces = (kSumCount + 15) / 16 * 16;
  static_assert(kStride == kColumns + (kSums ? 4 * kSumPlaces : 0), "a row, and its sums");
  static constexpr int kThreads = 128;
  static constexpr int kChunks = kColumns / 32;  // of a row: the columns of a thread
  static constexpr int kChunksOfThread = 4;
  static constexpr int kRowThreads = kChunks > 256 ? 128 : kChunks > 128 ? 64 : 32;
  static constexpr int kCtaRows = kThreads / kRowThreads;
  static constexpr int kRounds = (kChunks + kRowThreads - 1) / kRowThreads;
  static constexpr int64_t kMaxCtas = (kRows + kCtaRows - 1) / kCtaRows;
  static constexpr float kLargest = kSame<Byte, Fp8> ? 448.0f : 127.0f;
  static_assert(kColumns % 32 == 0, "whole fragments");

  const T* __restrict__ x;     // [kRows, kSourceStride]
  Byte* __restrict__ bytes;    // [kRows, kStride]
  float* __restrict__ scales;  // [kRows]

  __device__ void run() const {
    __shared__ uint32_t extents[kThreads / 32];
    const int lane = threadIdx.x % kRowThreads;
    const int64_t row = int64_t(blockIdx.x) * kCtaRows + threadIdx.x / kRowThreads;
    const bool real = row < kRows;
    wait_for_previous_kernel();
    allow_next_kernel();

    // The largest magnitude: of bits, so that NaN is the largest.
    uint4 words[kRounds][4];
    uint32_t extent = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int chunk = i * kRowThreads + lane;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[i][j] = uint4{0, 0, 0, 0};
        if (real && chunk < kChunks) {
          words[i][j] = reinterpret_cast<const uint4*>(x + row * kSourceStride)[chunk * 4 + j];
        }
        for (const uint32_t pair : {words[i][j].x, words[i][j].y, words[i][j].z, words[i][j].w}) {
          extent = max(extent, max(pair & 0x7FFFu, pair >> 16 & 0x7FFFu));
        }
      }
    }
    extent = maximum_of_warp(extent);
    if constexpr (kRowThreads > 32) {
      if (threadIdx.x % 32 == 0) extents[threadIdx.x / 32] = extent;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kRowThreads / 32; ++w) {
        extent = max(extent, extents[threadIdx.x / kRowThreads * (kRowThreads / 32) + w]);
      }
    }
    const float least = __uint_as_float((127 - 100) << 23);  // 2^-100: the inverse is finite
    float largest = to_float<T>(static_cast<uint16_t>(extent));
    largest = largest < least ? least : largest;
    const float inverse = __fdiv_rn(kLargest, largest);
    if (real && lane == 0) scales[row] = __fmul_rn(largest, 1.0f / kLargest);

    unsigned char* out = reinterpret_cast<unsigned char*>(bytes) + row * kStride;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int chunk = i * kRowThreads + lane;
      uint32_t made[8] = {};
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // rows 8 j to 8 j + 7 of K: s = j / 2, h = j % 2
        const uint32_t pairs[4] = {words[i][j].x, words[i][j].y, words[i][j].z, words[i][j].w};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float low = to_float<T>(static_cast<uint16_t>(pairs[t])) * inverse;
          const float high = to_float<T>(static_cast<uint16_t>(pairs[t] >> 16)) * inverse;
          const uint32_t codes = quantized_pair<Byte>(low, high, sum);
          const int s = j / 2, h = j % 2;
          if constexpr (kCodeBits == 4) {
            made[4 * h + t] |= codes << 16 * s;
          } else {
            made[4 * s + t] |= (codes & 0xFFu) << 8 * h | (codes & 0xFF00u) << (8 + 8 * h);
          }
        }
      }
      if (real && chunk < kChunks) {
        reinterpret_cast<uint4*>(out)[2 * chunk] = uint4{made[0], made[1], made[2], made[3]};
        reinterpret_cast<uint4*>(out)[2 * chunk + 1] = uint4{made[4], made[5], made[6], made[7]};
      }
      if constexpr (kSums) {
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (real && chunk < kChunks && chunk % 4 == 0) store_sum(out + kColumns, chunk / 4, sum);
      }
    }
    if constexpr (kSums) {
      for (int i = kSumCount + lane; real && i < kSumPlaces; i += kRowThreads) store_sum(out + kColumns, i, 0.0f);
    }
  }

 private:
  __device__ __forceinline__ static void store_sum(unsigned char* tail, int i, float sum) {
    const uint16_t high = from_float<BFloat>(sum), low = from_float<BFloat>(sum - to_float<BFloat>(high));
    uint16_t* place = reinterpret_cast<uint16_t*>(tail + i / 16 * 64 + i % 8 / 2 * 16 + i % 16 / 8 * 4) + i % 2;
    place[0] = high, place[4] = low;
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
      const float a = fminf(fmaxf(rintf(first), -127.0f), 127.0f), b = fminf(fmaxf(rintf(second), -127.0f), 127.0f);
      sum += a + b;
      return (static_cast<int>(a) & 0xFF) | (static_cast<int>(b) & 0xFF) << 8;
    }
  }
};

}  // namespace jmm
