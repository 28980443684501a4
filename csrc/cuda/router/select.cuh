// From logits to experts and weights, as `route` has it (jax_marlin_moe/routing.py): one token per warp.
//
// The slices of K that the product left are added in their order: by one warp for a token of few experts, each lane
// those of its experts, and by several otherwise. A lane has consecutive experts, so that among equal scores the lowest
// lane has the lowest expert. Scores are compared as integers in the order of their bits, which is that of the numbers,
// with NaN at both ends: whatever the logits are, the ids are distinct and in range.
//
// Where weights multiply the input of experts, this kernel writes that input too, a row for each slot.
#pragma once

#include "offsets.cuh"
#include "ptx/numbers.cuh"
#include "ptx/synchronization.cuh"
#include "router/best_experts.cuh"
#include "router/best_groups.cuh"
#include "router/element.cuh"
#include "router/scoring.cuh"
#include "router/slices.cuh"
#include "token_count.cuh"

namespace jmm {

// Facts: jax_marlin_moe/cuda/kernels/router.py.
template <class Facts>
struct RouterSelect {
  using Scores = typename Facts::Scores;
  using RouterBias = typename Facts::RouterBias;          // elements
  using CorrectionBias = typename Facts::CorrectionBias;  // elements
  using ExpertScale = typename Facts::ExpertScale;        // elements
  using X = typename Facts::Element;                      // of the experts' input
  static constexpr int kTokens = Facts::kTokens, kExperts = Facts::kExperts, kTopK = Facts::kTopK;
  static constexpr int kSlots = Facts::kSlots;  // of a token: its choice, and the shared experts
  static constexpr int kSlices = Facts::kSlices, kStride = Facts::kStride;
  static constexpr int kGroups = Facts::kGroups, kTopGroups = Facts::kTopGroups;
  static constexpr bool kTop2 = Facts::kTop2;  // what a group is worth: its best two, or its best
  static constexpr bool kGiven = Facts::kGiven, kGated = Facts::kGated;
  static constexpr bool kRouterBiased = Facts::kRouterBiased, kBiased = Facts::kBiased, kScaled = Facts::kScaled;
  static constexpr bool kCapped = Facts::kCapped, kChosenSigmoid = Facts::kChosenSigmoid;
  static constexpr bool kSoftmaxOfChosen = Facts::kSoftmaxOfChosen, kRenormalized = Facts::kRenormalized;
  static constexpr bool kMixer = Facts::kMixer;      // weights are softmaxes over what is close ("sparsemixer")
  static constexpr bool kNormed = Facts::kNormed;    // the router reads normed rows, whose squares the product adds
  static constexpr bool kOnInput = Facts::kOnInput;  // weights multiply the experts' input
  static constexpr int kK = Facts::kK, kColumns = Facts::kColumns;  // of the router's rows, and of the experts' input
  static constexpr int kWarps = Facts::kWarps, kWarpsOfToken = Facts::kWarpsOfToken;  // that add slices
  static constexpr int kThreads = 32 * kWarps, kTokensOfCta = kWarps / kWarpsOfToken;
  static constexpr int kMaxCtas = (kTokens + kTokensOfCta - 1) / kTokensOfCta;
  static constexpr int kCount = (kExperts + 31) / 32;  // experts of a lane
  static constexpr int kThreadsOfToken = 32 * kWarpsOfToken;
  // Whether one warp has a token from its logits on, in registers.
  static constexpr bool kAlone = Facts::kAlone;
  // Whether only quotients of scores matter, so that a softmax need not be divided by its sum.
  static constexpr bool kQuotients = Facts::kQuotients;
  // Whether a weight is made of the number that the expert was chosen by, rather than of the score in its row.
  static constexpr bool kByChoice = !kGiven && !kBiased && !kMixer && kTopGroups == kGroups;
  using Slices = LogitSlices<kSlices, kTokens, kStride, kWarpsOfToken, kCount>;
  using Groups = BestGroups<kCount, kExperts, kGroups, kTopGroups, kTop2>;
  using Best = BestExperts<kCount, kTopK, kSoftmaxOfChosen>;
  using Choice = typename Best::Choice;
  // Logits to be made scores.
  static constexpr int kOfThread = kAlone ? kCount : (kStride + kThreadsOfToken - 1) / kThreadsOfToken;
  static_assert(kStride % 4 == 0, "logits are read four at a time");
  static_assert(kSlots <= 32 && kGroups <= 32 && kCount <= 32, "a lane for each slot and group, a bit for each expert");
  static_assert(kExperts % kGroups == 0, "groups are equal");
  static_assert(!kAlone || (kWarpsOfToken == 1 && !kGated && !kNormed && !kOnInput && kTopGroups == kGroups),
                "what is behind the experts' logits, and groups, are for several warps");
  static_assert(!kOnInput || kColumns % 8 == 0, "rows are read eight numbers at a time");

  struct Shared {
    float logits[kWarps][kStride];         // of a part of the slices; the first row of a token becomes its scores
    float choices[kTokensOfCta][kStride];  // scores with the correction bias; or that alone, where scores are of all
    float weights[kOnInput ? kTokensOfCta : 1][kOnInput ? kSlots : 4];  // of a token's slots
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  const float* logits;                                 // [kSlices, kTokens, kStride], from the kernel before
  const RouterBias* __restrict__ router_bias;          // [kExperts] if kRouterBiased
  const CorrectionBias* __restrict__ correction_bias;  // [kExperts] if kBiased
  const ExpertScale* __restrict__ expert_scale;        // [kExperts] if kScaled
  const int32_t* __restrict__ given;                   // [kTokens, kTopK] if kGiven
  float* __restrict__ topk_weights;                    // [kTokens, kSlots]
  int32_t* __restrict__ topk_ids;                      // [kTokens, kSlots]
  // If kOnInput: the experts' input, [kTokens, kColumns], and for each slot its row, and what multiplies its result.
  const X* __restrict__ x;
  X* __restrict__ rows;              // [kTokens, kSlots, kColumns]
  float* __restrict__ slot_weights;  // [kTokens, kSlots]
  [[no_unique_address]] TokenCount<Facts::kCounted> count;

  __device__ void run(unsigned char* shared_bytes) const {
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    const int thread = threadIdx.x % kThreadsOfToken;
    const int token = blockIdx.x * kTokensOfCta + threadIdx.x / kThreadsOfToken;
    Biases biases;
    read_biases(biases, thread);
    wait_for_previous_kernel();
    // Not before the kernel before has left: between its CTAs, those of the next kernel would be dealt out unevenly.
    allow_next_kernel();
    if constexpr (kAlone) {
      if (token < count.of(kTokens)) run_warp(shared, biases, token, threadIdx.x / 32, thread);
    } else {
      const auto read = [&](int slice, int vector) {
        return reinterpret_cast<const float4*>(logits + (int64_t(slice) * kTokens + token) * kStride)[vector];
      };
      run_token(shared, biases, token, read);
    }
  }

  // What a thread adds to logits and scores.
  struct Biases {
    float of_logits[kOfThread], of_choices[kOfThread];
  };

  __device__ __forceinline__ void read_biases(Biases& biases, int thread) const {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int e = min(kAlone ? thread * kCount + i : i * kThreadsOfToken + thread, kExperts - 1);
      biases.of_logits[i] = biases.of_choices[i] = 0.0f;
      if constexpr (kRouterBiased) biases.of_logits[i] = number(router_bias[e]);
      if constexpr (kBiased) biases.of_choices[i] = number(correction_bias[e]);
    }
  }

  // The token of this thread, whose slices of logits `read(slice, vector)` has, four numbers of a slice at a time.
  template <class Read>
  __device__ __forceinline__ void run_token(Shared& shared, const Biases& biases, int token, const Read& read) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int thread = threadIdx.x % kThreadsOfToken, token_of_cta = warp / kWarpsOfToken;
    if (token < count.of(kTokens)) Slices::add(shared.logits[warp], warp % kWarpsOfToken, lane, read);
    sync_token();
    float* const row = shared.logits[token_of_cta * kWarpsOfToken];
    float* const choice = shared.choices[token_of_cta];
    float norm = 1.0f;
    if constexpr (kNormed) {
      constexpr uint32_t kNormEpsilon = Facts::kNormEpsilon;
      float squares = row[kSquaresAt];
#pragma unroll
      for (int w = 1; w < kWarpsOfToken; ++w) squares += row[w * kStride + kSquaresAt];
      norm = rsqrtf(squares / kK + __uint_as_float(kNormEpsilon)) * rsqrtf(static_cast<float>(kK));
    }
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int e = i * kThreadsOfToken + thread;
      if (e >= kStride) break;
      float value = row[e];
#pragma unroll
      for (int w = 1; w < kWarpsOfToken; ++w) value += row[w * kStride + e];
      if (e < kExperts) {
        if constexpr (kNormed) value *= norm;
        value = score_of(value, biases.of_logits[i]);
        choice[e] = Scores::kOfAll ? biases.of_choices[i] : value + biases.of_choices[i];
      }
      if (!kNormed || e != kSquaresAt) row[e] = value;  // others read the squares
    }
    sync_token();
    if (token < count.of(kTokens) && warp % kWarpsOfToken == 0) {
      choose(row, choice, shared.weights[kOnInput ? token_of_cta : 0], token, lane);
    }
    if constexpr (kOnInput) {
      sync_token();
      if (token < count.of(kTokens)) write_rows(shared.weights[token_of_cta], token, thread);
    }
  }

 private:
  // A token by itself: what it chooses among is never in memory.
  __device__ __forceinline__ void run_warp(Shared& shared, const Biases& biases, int token, int warp, int lane) const {
    float values[kCount];
    Slices::add_of_lane(logits, values, token, lane);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = score_of(values[i], biases.of_logits[i]);
      if (Scores::kOfAll && lane * kCount + i >= kExperts) values[i] = __uint_as_float(kMinusInfinity);
    }
    if constexpr (kQuotients) {
      Scores::exponentiate(values);
    } else if constexpr (Scores::kOfAll) {
      Scores::apply(values);
    }
    float* const row = shared.logits[warp];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int e = lane * kCount + i;
      if (!kByChoice && e < kExperts) row[e] = values[i];
      if constexpr (kBiased) values[i] += biases.of_choices[i];
    }
    if constexpr (!kByChoice) __syncwarp();
    choose_among(row, shared.choices[warp], nullptr, 1.0f, values, token, lane);
  }

  // A logit with its bias, capped; and its score, where that is of one logit.
  __device__ __forceinline__ static float score_of(float value, float bias) {
    value += bias;
    if constexpr (kCapped) {
      constexpr uint32_t kCap = Facts::kCap;
      value = tanhf(value / __uint_as_float(kCap)) * __uint_as_float(kCap);
    }
    if constexpr (!Scores::kOfAll) value = Scores::of(value);
    return value;
  }

  static constexpr uint32_t kMinusInfinity = 0xFF800000u;
  static constexpr int kSquaresAt = kExperts + kGated;  // of the logits
  // That a power of two, the first lanes, have the choice.
  static constexpr int kLanesOfChoice = kTopK <= 1    ? 1
                                        : kTopK <= 2  ? 2
                                        : kTopK <= 4  ? 4
                                        : kTopK <= 8  ? 8
                                        : kTopK <= 16 ? 16
                                                      : 32;
  __device__ __forceinline__ static void sync_token() {
    if constexpr (kWarpsOfToken > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  __device__ __forceinline__ void choose(float* row, float* choice, float* slots, int token, int lane) const {
    const float gate = kGated ? exact_sigmoid(row[kExperts]) : 1.0f;
    float values[kCount];
    if constexpr (Scores::kOfAll) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int e = lane * kCount + i;
        values[i] = e < kExperts ? row[e] : __uint_as_float(kMinusInfinity);
      }
      Scores::apply(values);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int e = lane * kCount + i;
        if (e < kExperts) {
          row[e] = values[i];
          choice[e] = values[i] += choice[e];
        }
      }
      __syncwarp();
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = choice[min(lane * kCount + i, kExperts - 1)];
    }
    choose_among(row, choice, slots, gate, values, token, lane);
  }

  // By what the experts of each lane are chosen by: `values`. The row has their scores; `choice` is theirs by groups.
  __device__ __forceinline__ void choose_among(float* row, float* choice, float* slots, float gate,
                                               const float (&values)[kCount], int token, int lane) const {
    Choice chosen;
    bool there = lane < kTopK;
    if constexpr (kGiven) {
      if (there) chosen.id = given[int64_t(token) * kTopK + lane];
      there = there && chosen.id >= 0 && chosen.id < kExperts;
    } else {
      uint32_t keys[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) keys[i] = lane * kCount + i < kExperts ? order_of(values[i]) : 0;
      if constexpr (kTopGroups < kGroups) {
        const bool mine = Groups::keep(choice, values, keys, lane);
        const uint32_t kept = Groups::kOfLanes ? 0 : __ballot_sync(~0u, mine);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int group = min((lane * kCount + i) / Groups::kSize, kGroups - 1);
          const bool stays = Groups::kOfLanes ? mine : kept >> group & 1;
          if (keys[i] != 0 && !stays) keys[i] = order_of(__uint_as_float(kMinusInfinity));
        }
      }
      chosen = Best::find(keys, choice, lane);
    }
    weigh(row, gate, slots, chosen, there, token, lane);
  }

  // Lane j gets the softmax of the j-th chosen logit over itself and those close to it that are not chosen before it.
  __device__ __forceinline__ static float mix(const float* row, int id, int lane) {
    constexpr uint32_t kTwiceJitter = Facts::kTwiceJitter;
    uint32_t taken = 0;  // of this lane's experts
    float weight = 0.0f;
#pragma unroll 1
    for (int j = 0; j < kTopK; ++j) {
      const int chosen = __shfl_sync(~0u, id, j);
      const float top = row[chosen];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int e = lane * kCount + i;
        if (e >= kExperts || (taken >> i & 1)) continue;
        const float value = row[e];
        // Not `<=`: where all are zero, the quotient is NaN, and they are close.
        const bool far = (top - value) / fmaxf(fabsf(value), top) > __uint_as_float(kTwiceJitter);
        if (!far) sum += expf(value - top);
      }
      sum = sum_of_warp(sum);
      if (lane == j) weight = 1.0f / sum;
      if (chosen / kCount == lane) taken |= 1u << chosen % kCount;
    }
    return weight;
  }

  // A row for each slot: that of x, times the slot's weight, rounded; that of x itself for shared experts.
  __device__ __forceinline__ void write_rows(const float* slots, int token, int thread) const {
    constexpr int kPieces = kColumns / 8;
    constexpr int64_t kAllPieces = int64_t(kTokens) * kSlots * kPieces;
    const uint4* const source = reinterpret_cast<const uint4*>(x) + Offset<kAllPieces>(token) * kPieces;
    uint4* const out = reinterpret_cast<uint4*>(rows) + Offset<kAllPieces>(token) * (kSlots * kPieces);
    for (int piece = thread; piece < kPieces; piece += kThreadsOfToken) {
      const uint4 pairs = source[piece];
#pragma unroll 1
      for (int j = 0; j < kSlots; ++j) {
        const float weight = slots[j];
        const uint4 weighted = {weigh_pair(pairs.x, weight), weigh_pair(pairs.y, weight), weigh_pair(pairs.z, weight),
                                weigh_pair(pairs.w, weight)};
        out[j * kPieces + piece] = j < kTopK ? weighted : pairs;
      }
    }
  }

  __device__ __forceinline__ static uint32_t weigh_pair(uint32_t pair, float weight) {
    const float low = to_float<X>(static_cast<uint16_t>(pair)), high = to_float<X>(static_cast<uint16_t>(pair >> 16));
    return from_float<X>(low * weight) | uint32_t(from_float<X>(high * weight)) << 16;
  }

  __device__ __forceinline__ void weigh(const float* row, float gate, float* slots, const Choice& chosen, bool there,
                                        int token, int lane) const {
    constexpr uint32_t kScale = Facts::kScale, kEpsilon = Facts::kEpsilon;
    constexpr bool kSummed = kByChoice && !kChosenSigmoid;
    int id = chosen.id;
    float weight = 0.0f;
    if (there) weight = kByChoice ? chosen.number : row[id];
    if constexpr (kMixer) weight = mix(row, id, lane);
    if constexpr (kChosenSigmoid) weight = there ? exact_sigmoid(weight) : 0.0f;
    if constexpr (kSoftmaxOfChosen) {
      // The first choice is the largest, or not a number.
      const float most = kSummed ? chosen.first : largest_of_warp(there ? weight : __uint_as_float(kMinusInfinity));
      weight = there ? expf(weight - most) : 0.0f;
      weight = Divisor(kSummed ? chosen.sum : sum_of_warp<kLanesOfChoice>(weight)).divide(weight);
    } else if constexpr (kRenormalized) {
      const float sum = (kSummed ? chosen.sum : sum_of_warp<kLanesOfChoice>(weight)) + __uint_as_float(kEpsilon);
      weight = kQuotients ? Divisor(sum).divide(weight) : weight / sum;
    }
    if constexpr (kScale != 0x3F800000u) weight *= __uint_as_float(kScale);
    if constexpr (kScaled) weight *= there ? number(expert_scale[id]) : 1.0f;
    if (!there) weight = 0.0f;
    if (lane >= kTopK) id = kExperts + lane - kTopK, weight = gate;
    if (lane < kSlots) {
      topk_ids[int64_t(token) * kSlots + lane] = id;
      topk_weights[int64_t(token) * kSlots + lane] = weight;
      if constexpr (kOnInput) {
        slots[lane] = weight;
        slot_weights[int64_t(token) * kSlots + lane] = lane < kTopK ? 1.0f : weight;
      }
    }
  }
};

}  // namespace jmm
