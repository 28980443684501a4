// The slices of K that the product leaves of a token's logits, added in their order.
#pragma once

#include "types.cuh"

namespace jmm {

// logits: [kSlices, kTokens, kStride]. A lane has kCount experts, where one warp has a token; kWarpsOfToken add
// otherwise.
template <int kSlices, int kTokens, int kStride, int kWarpsOfToken, int kCount>
struct LogitSlices {
  // Those of one of the warps of a token, to its row of sums.
  template <class Read>
  __device__ __forceinline__ static void add(float* row, int part, int lane, const Read& read) {
    constexpr int kSlicesOfWarp = (kSlices + kWarpsOfToken - 1) / kWarpsOfToken;
    constexpr int kAtOnce = kSlicesOfWarp < 8 ? kSlicesOfWarp : 8;  // on their way together
    float4 sums[kLaneVectors];
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) sums[v] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int first = 0; first < kSlicesOfWarp; first += kAtOnce) {
      float4 parts[kAtOnce][kLaneVectors];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int slice = part * kSlicesOfWarp + first + i;
        const bool there = first + i < kSlicesOfWarp && slice < kSlices;
#pragma unroll
        for (int v = 0; v < kLaneVectors; ++v) {
          parts[i][v] = {0.0f, 0.0f, 0.0f, 0.0f};
          if (there && v * 32 + lane < kVectors) parts[i][v] = read(slice, v * 32 + lane);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int v = 0; v < kLaneVectors; ++v) {
          sums[v].x += parts[i][v].x, sums[v].y += parts[i][v].y;
          sums[v].z += parts[i][v].z, sums[v].w += parts[i][v].w;
        }
    }
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) {
      if (v * 32 + lane < kVectors) reinterpret_cast<float4*>(row)[v * 32 + lane] = sums[v];
    }
  }

  // The logits of a lane's experts, any numbers where it has none.
  __device__ __forceinline__ static void add_of_lane(const float* logits, float (&sums)[kCount], int token, int lane) {
    constexpr int kMost = kMostNumbers / kCount, kTurns = (kSlices + kMost - 1) / kMost;
    constexpr int kAtOnce = (kSlices + kTurns - 1) / kTurns;  // on their way together
    constexpr int kVector = kCount % 4 == 0 ? 4 : kCount % 2 == 0 ? 2 : 1;
    const float* const first = logits + int64_t(token) * kStride + min(lane * kCount, kStride - kCount);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0.0f;
#pragma unroll 1
    for (int slice = 0; slice < kSlices; slice += kAtOnce) {
      float parts[kAtOnce][kCount];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s)
#pragma unroll
        for (int i = 0; i < kCount; i += kVector) {
          const int from = kSlices % kAtOnce == 0 ? slice + s : min(slice + s, kSlices - 1);
          load_global_words<kVector>(parts[s] + i, first + int64_t(from) * kTokens * kStride + i);
        }
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s)
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (kSlices % kAtOnce == 0 || slice + s < kSlices) sums[i] += parts[s][i];
        }
    }
  }

 private:
  static constexpr int kMostNumbers = 192;  // of slices, that a lane has registers for
  static constexpr int kVectors = kStride / 4, kLaneVectors = (kVectors + 31) / 32;

  template <int kVector>
  __device__ __forceinline__ static void load_global_words(float* to, const float* from) {
    if constexpr (kVector == 4) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (kVector == 2) {
      const float2 v = *reinterpret_cast<const float2*>(from);
      to[0] = v.x, to[1] = v.y;
    } else {
      to[0] = *from;
    }
  }
};

}  // namespace jmm
