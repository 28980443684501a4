// From logits to experts and weights, as `route` has it (jax_marlin_moe/routing.py): one token per warp.
//
// The slices of K that the product left are added in their order. A lane has consecutive experts, so that among equal
// scores the lowest lane has the lowest expert. Scores are compared as integers in the order of their bits, which is
// that of the numbers, with NaN at both ends: whatever the logits are, the ids are distinct and in range.
#pragma once

#include "router/element.cuh"
#include "router/scoring.cuh"

namespace jmm {

// Facts: jax_marlin_moe/cuda/kernels/router.py.
template <class Facts>
struct RouterSelect {
  using Scores = typename Facts::Scores;
  using RouterBias = typename Facts::RouterBias;          // elements
  using CorrectionBias = typename Facts::CorrectionBias;  // elements
  using ExpertScale = typename Facts::ExpertScale;        // elements
  static constexpr int kTokens = Facts::kTokens, kExperts = Facts::kExperts, kTopK = Facts::kTopK;
  static constexpr int kSlots = Facts::kSlots;  // of a token: its choice, and the shared experts
  static constexpr int kSlices = Facts::kSlices, kStride = Facts::kStride;
  static constexpr int kGroups = Facts::kGroups, kTopGroups = Facts::kTopGroups;
  static constexpr bool kTop2 = Facts::kTop2;  // what a group is worth: its best two, or its best
  static constexpr bool kGiven = Facts::kGiven, kGated = Facts::kGated;
  static constexpr bool kRouterBiased = Facts::kRouterBiased, kBiased = Facts::kBiased, kScaled = Facts::kScaled;
  static constexpr bool kCapped = Facts::kCapped, kChosenSigmoid = Facts::kChosenSigmoid;
  static constexpr bool kSoftmaxOfChosen = Facts::kSoftmaxOfChosen, kRenormalized = Facts::kRenormalized;
  static constexpr int kWarps = Facts::kWarps, kWarpsOfToken = Facts::kWarpsOfToken;  // that add slices
  static constexpr int kThreads = 32 * kWarps, kTokensOfCta = kWarps / kWarpsOfToken;
  static constexpr int kMaxCtas = (kTokens + kTokensOfCta - 1) / kTokensOfCta;
  static constexpr int kCount = (kExperts + 31) / 32;  // experts of a lane
  static constexpr int kVectors = kStride / 4, kLaneVectors = (kVectors + 31) / 32;
  static_assert(kStride % 4 == 0, "logits are read four at a time");
  static_assert(kSlots <= 32 && kGroups <= 32 && kCount <= 32, "a lane for each slot and group, a bit for each expert");
  static_assert(kExperts % kGroups == 0, "groups are equal");

  struct Shared {
    float logits[kWarps][kStride];  // partial sums, then those of the token: its logits, scores or choice
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  const float* logits;                                 // [kSlices, kTokens, kStride], from the kernel before
  const RouterBias* __restrict__ router_bias;          // [kExperts] if kRouterBiased
  const CorrectionBias* __restrict__ correction_bias;  // [kExperts] if kBiased
  const ExpertScale* __restrict__ expert_scale;        // [kExperts] if kScaled
  const int32_t* __restrict__ given;                   // [kTokens, kTopK] if kGiven
  float* __restrict__ topk_weights;                    // [kTokens, kSlots]
  int32_t* __restrict__ topk_ids;                      // [kTokens, kSlots]

  __device__ void run(unsigned char* shared_bytes) const {
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token = blockIdx.x * kTokensOfCta + warp / kWarpsOfToken;
    float biases[kCount], corrections[kCount];
    if (kWarpsOfToken == 1 || warp % kWarpsOfToken == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int e = min(lane * kCount + i, kExperts - 1);
        biases[i] = corrections[i] = 0.0f;
        if constexpr (kRouterBiased) biases[i] = number(router_bias[e]);
        if constexpr (kBiased) corrections[i] = number(correction_bias[e]);
      }
    }
    // The next kernel reads nothing of the call before it has waited for this one.
    allow_next_kernel();
    wait_for_previous_kernel();

    if (token < kTokens) add_slices(shared.logits[warp], token, warp % kWarpsOfToken, lane);
    if constexpr (kWarpsOfToken > 1) {
      __syncthreads();
      float* const row = shared.logits[warp / kWarpsOfToken * kWarpsOfToken];
      for (int i = threadIdx.x % (32 * kWarpsOfToken); i < kStride; i += 32 * kWarpsOfToken) {
        float sum = row[i];
#pragma unroll
        for (int w = 1; w < kWarpsOfToken; ++w) sum += row[w * kStride + i];
        row[i] = sum;
      }
      __syncthreads();
    } else {
      __syncwarp();
    }
    if (token < kTokens && warp % kWarpsOfToken == 0) {
      choose(shared.logits[warp], biases, corrections, token, lane);
    }
  }

 private:
  __device__ __forceinline__ void add_slices(float* row, int token, int part, int lane) const {
    constexpr int kSlicesOfWarp = (kSlices + kWarpsOfToken - 1) / kWarpsOfToken;
    float4 sums[kLaneVectors];
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) sums[v] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int i = 0; i < kSlicesOfWarp; ++i) {
      const int slice = part * kSlicesOfWarp + i;
      if (slice >= kSlices) break;
      const float4* const source =
          reinterpret_cast<const float4*>(logits + (int64_t(slice) * kTokens + token) * kStride);
#pragma unroll
      for (int v = 0; v < kLaneVectors; ++v) {
        if (v * 32 + lane >= kVectors) continue;
        const float4 part_sum = source[v * 32 + lane];
        sums[v].x += part_sum.x, sums[v].y += part_sum.y, sums[v].z += part_sum.z, sums[v].w += part_sum.w;
      }
    }
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) {
      if (v * 32 + lane < kVectors) reinterpret_cast<float4*>(row)[v * 32 + lane] = sums[v];
    }
  }

  // Larger for larger numbers, and never 0.
  __device__ __forceinline__ static uint32_t key(float value) {
    const uint32_t bits = __float_as_uint(value);
    return max(bits >> 31 ? ~bits : bits | 0x80000000u, 1u);
  }

  __device__ __forceinline__ void choose(float* row, const float (&biases)[kCount], const float (&corrections)[kCount],
                                         int token, int lane) const {
    const float minus_infinity = __uint_as_float(0xFF800000u);
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int e = lane * kCount + i;
      float value = e < kExperts ? row[e] + biases[i] : minus_infinity;
      if constexpr (kCapped) {
        constexpr uint32_t kCap = Facts::kCap;
        const float cap = __uint_as_float(kCap);
        if (e < kExperts) value = tanhf(value / cap) * cap;
      }
      values[i] = value;
    }
    const float gate = kGated ? exact_sigmoid(row[kExperts]) : 1.0f;
    Scores::apply(values);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (lane * kCount + i < kExperts) row[lane * kCount + i] = values[i];
    }
    __syncwarp();

    int id = 0;
    bool there = lane < kTopK;
    if constexpr (kGiven) {
      if (there) id = given[int64_t(token) * kTopK + lane];
      there = there && id >= 0 && id < kExperts;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += corrections[i];
      const uint32_t kept = kTopGroups < kGroups ? best_groups(row, lane) : ~0u;
      id = best_experts(values, kept, lane);
    }
    weigh(row, gate, id, there, token, lane);
  }

  // The bits of the kTopGroups groups of the largest worth. The row has scores.
  __device__ __forceinline__ uint32_t best_groups(const float* row, int lane) const {
    constexpr int kSize = kExperts / kGroups;
    float first = 0.0f, second = 0.0f;
    if (lane < kGroups) {
      uint32_t first_key = 0, second_key = 0;
#pragma unroll 8
      for (int i = 0; i < kSize; ++i) {
        const int e = lane * kSize + i;
        float value = row[e];
        if constexpr (kBiased) value += number(correction_bias[e]);
        const uint32_t k = key(value);
        if (k > first_key) {
          second = first, second_key = first_key, first = value, first_key = k;
        } else if (k > second_key) {
          second = value, second_key = k;
        }
      }
    }
    const float worth = kTop2 && kSize > 1 ? first + second : first;
    const uint32_t mine = lane < kGroups ? key(worth) : 0;
    int better = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t theirs = __shfl_sync(~0u, mine, g);
      better += theirs > mine || (theirs == mine && g < lane);
    }
    return __ballot_sync(~0u, lane < kGroups && better < kTopGroups);
  }

  // Lane j gets the expert of the j-th largest value.
  __device__ __forceinline__ static int best_experts(const float (&values)[kCount], uint32_t kept, int lane) {
    constexpr int kSize = kExperts / kGroups;
    uint32_t keys[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int e = lane * kCount + i;
      const bool masked = kTopGroups < kGroups && !(kept >> min(e / kSize, kGroups - 1) & 1);
      keys[i] = e >= kExperts ? 0 : key(masked ? __uint_as_float(0xFF800000u) : values[i]);
    }
    int id = 0;
#pragma unroll 1
    for (int j = 0; j < kTopK; ++j) {
      uint32_t best = keys[0];
      int at = 0;
#pragma unroll
      for (int i = 1; i < kCount; ++i) {
        if (keys[i] > best) best = keys[i], at = i;
      }
      const uint32_t most = maximum_of_warp(best);
      const int owner = __ffs(__ballot_sync(~0u, best == most)) - 1;
      const int chosen = __shfl_sync(~0u, lane * kCount + at, owner);
      if (lane == j) id = chosen;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (lane * kCount + i == chosen) keys[i] = 0;
      }
    }
    return id;
  }

  __device__ __forceinline__ void weigh(const float* row, float gate, int id, bool there, int token, int lane) const {
    constexpr uint32_t kScale = Facts::kScale, kEpsilon = Facts::kEpsilon;
    float weight = there ? row[id] : 0.0f;
    if constexpr (kChosenSigmoid) weight = there ? exact_sigmoid(weight) : 0.0f;
    if constexpr (kSoftmaxOfChosen) {
      const float most = largest_of_warp(there ? weight : __uint_as_float(0xFF800000u));
      weight = there ? expf(weight - most) : 0.0f;
      weight /= sum_of_warp(weight);
    } else if constexpr (kRenormalized) {
      weight /= sum_of_warp(weight) + __uint_as_float(kEpsilon);
    }
    if constexpr (kScale != 0x3F800000u) weight *= __uint_as_float(kScale);
    if constexpr (kScaled) weight *= there ? number(expert_scale[id]) : 1.0f;
    if (!there) weight = 0.0f;
    if (lane >= kTopK) id = kExperts + lane - kTopK, weight = gate;
    if (lane < kSlots) {
      topk_ids[int64_t(token) * kSlots + lane] = id;
      topk_weights[int64_t(token) * kSlots + lane] = weight;
    }
  }
};

}  // namespace jmm
