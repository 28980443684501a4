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
#include "router/element.cuh"
#include "router/scoring.cuh"
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
  static constexpr int kVectors = kStride / 4, kLaneVectors = (kVectors + 31) / 32;
  static constexpr int kThreadsOfToken = 32 * kWarpsOfToken;
  // Whether one warp has a token from its logits on, in registers.
  static constexpr bool kAlone = Facts::kAlone;
  // Whether only quotients of scores matter, so that a softmax need not be divided by its sum.
  static constexpr bool kQuotients = Facts::kQuotients;
  // Whether a weight is made of the number that the expert was chosen by, rather than of the score in its row.
  static constexpr bool kByChoice = !kGiven && !kBiased && !kMixer && kTopGroups == kGroups;
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
    if (token < count.of(kTokens)) add_slices(shared.logits[warp], warp % kWarpsOfToken, lane, read);
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
    add_slices_of_lane(values, token, lane);
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
  static constexpr int kGroupSize = kExperts / kGroups;
  static constexpr int kLanesOfGroup = kGroupSize % kCount == 0 ? kGroupSize / kCount : 0;
  // That a power of two, the first lanes, have the choice.
  static constexpr int kLanesOfChoice = kTopK <= 1    ? 1
                                        : kTopK <= 2  ? 2
                                        : kTopK <= 4  ? 4
                                        : kTopK <= 8  ? 8
                                        : kTopK <= 16 ? 16
                                                      : 32;
  // Whether a group is what some neighbouring lanes have, a power of two of them.
  static constexpr bool kGroupsOfLanes = kLanesOfGroup > 0 && (kLanesOfGroup & (kLanesOfGroup - 1)) == 0;

  __device__ __forceinline__ static void sync_token() {
    if constexpr (kWarpsOfToken > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  template <class Read>
  __device__ __forceinline__ static void add_slices(float* row, int part, int lane, const Read& read) {
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

  static constexpr int kMostNumbers = 192;  // of slices, that a lane has registers for

  // The logits of a lane's experts, any numbers where it has none.
  __device__ __forceinline__ void add_slices_of_lane(float (&sums)[kCount], int token, int lane) const {
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
        const bool mine = keeps_group(choice, values, keys, lane);
        const uint32_t kept = kGroupsOfLanes ? 0 : __ballot_sync(~0u, mine);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int group = min((lane * kCount + i) / kGroupSize, kGroups - 1);
          const bool stays = kGroupsOfLanes ? mine : kept >> group & 1;
          if (keys[i] != 0 && !stays) keys[i] = order_of(__uint_as_float(kMinusInfinity));
        }
      }
      chosen = best_experts(keys, choice, lane);
    }
    weigh(row, gate, slots, chosen, there, token, lane);
  }

  // The best two of a group: their keys, and the numbers.
  struct BestTwo {
    uint32_t first_key = 0, second_key = 0;
    float first = 0.0f, second = 0.0f;

    __device__ __forceinline__ void take(uint32_t k, float value) {
      const bool leads = k > first_key, follows = k > second_key;
      second = leads ? first : follows ? value : second;
      second_key = leads ? first_key : follows ? k : second_key;
      first = leads ? value : first;
      first_key = leads ? k : first_key;
    }
  };

  // Whether a group is one of the kTopGroups of the largest worth: this lane's if kGroupsOfLanes, from all lanes'
  // values; else the one of the lane's number, from a row of them.
  __device__ __forceinline__ static bool keeps_group(const float* choice, const float (&values)[kCount],
                                                     const uint32_t (&keys)[kCount], int lane) {
    BestTwo best;
    if constexpr (kGroupsOfLanes) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) best.take(keys[i], values[i]);
#pragma unroll
      for (int distance = 1; distance < kLanesOfGroup; distance *= 2) {
        const uint32_t first_key = __shfl_xor_sync(~0u, best.first_key, distance);
        const uint32_t second_key = __shfl_xor_sync(~0u, best.second_key, distance);
        const float first = __shfl_xor_sync(~0u, best.first, distance);
        const float second = __shfl_xor_sync(~0u, best.second, distance);
        best.take(first_key, first);
        best.take(second_key, second);
      }
    } else if (lane < kGroups) {
#pragma unroll 8
      for (int i = 0; i < kGroupSize; ++i) {
        const float value = choice[lane * kGroupSize + i];
        best.take(order_of(value), value);
      }
    }
    const float worth = kTop2 && kGroupSize > 1 ? best.first + best.second : best.first;
    const int group = kGroupsOfLanes ? lane / kLanesOfGroup : lane;  // that this lane knows
    const uint32_t mine = order_of(worth);
    int better = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t theirs = __shfl_sync(~0u, mine, kGroupsOfLanes ? g * kLanesOfGroup : g);
      better += theirs > mine || (theirs == mine && g < group);
    }
    return group < kGroups && better < kTopGroups;
  }

  // The largest of a lane's keys, and which one it is: the lower one where keys are equal.
  struct BestOfLane {
    uint32_t key;
    int at;

    __device__ __forceinline__ explicit BestOfLane(const uint32_t (&keys)[kCount]) {
      uint32_t best[kCount];
      int number[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) best[i] = keys[i], number[i] = i;
      // Pairs, pairs of pairs, and so on.
#pragma unroll
      for (int distance = 1; distance < kCount; distance *= 2)
#pragma unroll
        for (int i = 0; i + distance < kCount; i += 2 * distance) {
          if (best[i + distance] > best[i]) best[i] = best[i + distance], number[i] = number[i + distance];
        }
      key = best[0], at = number[0];
    }
  };

  __device__ __forceinline__ static void clear(uint32_t (&keys)[kCount], int at, bool really) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (really && i == at) keys[i] = 0;
    }
  }

  static constexpr int kMostSorted = 4;  // experts of a lane: their number of exchanges is quadratic

  // The keys of a lane, largest first, and whose they are. Neighbours change places: of equal keys the lower expert
  // stays first.
  __device__ __forceinline__ static void sort(uint32_t (&keys)[kCount], int (&experts)[kCount], int lane) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) experts[i] = lane * kCount + i;
#pragma unroll
    for (int end = kCount - 1; end > 0; --end)
#pragma unroll
      for (int i = 0; i < end; ++i) {
        const bool swaps = keys[i + 1] > keys[i];
        const uint32_t key = keys[i];
        const int expert = experts[i];
        keys[i] = swaps ? keys[i + 1] : key, keys[i + 1] = swaps ? key : keys[i + 1];
        experts[i] = swaps ? experts[i + 1] : expert, experts[i + 1] = swaps ? expert : experts[i + 1];
      }
  }

  // What a lane has been given.
  struct Choice {
    int id = 0;
    float number = 0.0f;  // of its key
    float first = 0.0f;   // the number of lane 0's key
    float sum = 0.0f;     // of all lanes' numbers; or of their exponentials, if that is what weights are

    __device__ __forceinline__ void take(int j, uint32_t key, int lane) {
      const float value = number_of(key);
      if (lane == j) number = value;
      if (j == 0) first = value;
      sum += kSoftmaxOfChosen ? expf(value - first) : value;
    }
  };

  // Lane j gets the j-th largest key, and its expert. `ids` is room for the bits of all of them.
  __device__ __forceinline__ static Choice best_experts(const uint32_t (&all_keys)[kCount], float* ids, int lane) {
    Choice chosen;
    uint32_t keys[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) keys[i] = all_keys[i];
    __syncwarp();  // the room has been read
    // As if no keys were equal: a lane that has the maximum takes it without asking who else has it.
    bool equal = false;
    if constexpr (kCount <= kMostSorted) {
      int experts[kCount];
      sort(keys, experts, lane);
#pragma unroll kTopK <= 8 ? kTopK : 1
      for (int j = 0; j < kTopK; ++j) {
        const uint32_t most = maximum_of_warp(keys[0]);
        const bool mine = keys[0] == most;
        chosen.take(j, most, lane);
        if (mine) ids[j] = __int_as_float(experts[0]);
        equal |= __popc(__ballot_sync(~0u, mine)) > 1;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          keys[i] = !mine ? keys[i] : i + 1 < kCount ? keys[i + 1] : 0;
          if (i + 1 < kCount) experts[i] = mine ? experts[i + 1] : experts[i];
        }
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < kTopK; ++j) {
        const BestOfLane best(keys);
        const uint32_t most = maximum_of_warp(best.key);
        const bool mine = best.key == most;
        chosen.take(j, most, lane);
        clear(keys, best.at, mine);
        if (mine) ids[j] = __int_as_float(lane * kCount + best.at);
        equal |= __popc(__ballot_sync(~0u, mine)) > 1;
      }
    }
    __syncwarp();
    if (!equal) {
      chosen.id = __float_as_int(ids[min(lane, kTopK - 1)]);
      return chosen;
    }
    chosen = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) keys[i] = all_keys[i];
#pragma unroll 1
    for (int j = 0; j < kTopK; ++j) {
      const BestOfLane best(keys);
      const uint32_t most = maximum_of_warp(best.key);
      const int owner = __ffs(__ballot_sync(~0u, best.key == most)) - 1;
      chosen.take(j, most, lane);
      clear(keys, best.at, lane == owner);
      const int expert = __shfl_sync(~0u, lane * kCount + best.at, owner);
      if (lane == j) chosen.id = expert;
    }
    return chosen;
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
