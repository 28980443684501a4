// What becomes of finished float32 sums: bias, activation or router weight, one rounding, the store.
//
// An epilogue is called for one slot and one column at a time; sums of lanes that are four apart are neighbouring
// columns. One that quantises gets two columns, `column` and `column + 8`: eight lanes hold a block of 16.
// `factor(slot)` is what the slot's row is multiplied by, fetched before the product begins. The expert's type is one
// that its offset into the biases fits. Facts: jax_marlin_moe/cuda/kernels/epilogue.py.
#pragma once

#include "activations.cuh"
#include "four_columns.cuh"
#include "intermediate.cuh"
#include "ptx/memory.cuh"
#include "ptx/numbers.cuh"

namespace jmm {

// out[slot, column] = activation(gate + bias, up + bias), rounded to T or quantised: the input of the second product.
// Without a gate there is one half of kColumns, which the first argument has.
template <class Facts>
struct Activated {
  using T = typename Facts::Element;  // of the result
  using Activation = typename Facts::Activation;
  using Intermediate = typename Facts::Intermediate;
  static constexpr int kColumns = Facts::kColumns;
  static constexpr bool kBias = Facts::kBias;               // whether there is a bias
  static constexpr bool kScaled = Facts::kScaled;           // whether x is in units of a scale
  static constexpr bool kRowScaled = Facts::kRowScaled;     // whether each row of x is in units of its own
  static constexpr int kSlotsPerRow = Facts::kSlotsPerRow;  // of x

  T* __restrict__ out;                            // [slots, kColumns]
  const float* __restrict__ bias;                 // [experts, halves * kColumns] if kBias
  const float* __restrict__ x_scale;              // [1] if kScaled
  const float* __restrict__ intermediate_scales;  // [experts] if the intermediate is quantised
  const float* row_scales;                        // [rows of x] if kRowScaled, of the kernel before

  static constexpr bool kGated = Activation::kGated;

  __device__ __forceinline__ float factor(int slot) const {
    if constexpr (kRowScaled) return row_scales[slot / kSlotsPerRow];
    return 1.0f;
  }

  // With rows of bytes: what the sums of a row are multiplied by before the bias, and behind it.
  __device__ __forceinline__ float2 both_factors(int slot) const { return {factor(slot), 1.0f}; }

  // The bias of a column of gate (half 0) or up.
  template <class Expert>
  __device__ __forceinline__ const float* bias_of(Expert expert, int half, int column) const {
    return bias + expert * ((kGated ? 2 : 1) * kColumns) + half * kColumns + column;
  }

  // Of a column of gate and of up.
  template <class Expert>
  __device__ __forceinline__ float2 biases(Expert expert, int column) const {
    if constexpr (!kBias) return float2{};
    const float* row = bias_of(expert, 0, column);
    return {row[0], kGated ? row[kColumns] : 0.0f};
  }

  // What the activation takes.
  __device__ __forceinline__ void finish(float2 biases, float& gate, float& up) const {
    if constexpr (kScaled) {
      const float scale = usable_scale(x_scale[0]);
      gate *= scale;
      if constexpr (kGated) up *= scale;
    }
    if constexpr (kBias) {
      gate += biases.x;
      if constexpr (kGated) up += biases.y;
    }
  }

  __device__ __forceinline__ float activated(float2 biases, float gate, float up) const {
    finish(biases, gate, up);
    return Activation::apply(gate, up);
  }

  template <class Expert>
  __device__ __forceinline__ void store(Expert, int slot, float factor, int column, float gate, float up,
                                        float2 biases) const {
    if constexpr (kRowScaled) gate *= factor, up *= factor;
    out[int64_t(slot) * kColumns + column].bits = from_float<T>(activated(biases, gate, up));
  }

  // A column of two rows, side by side in a word.
  template <class Expert>
  __device__ __forceinline__ uint32_t of_two_rows(Expert expert, float2, int column, float2 gate, float2 up) const {
    static_assert(!kRowScaled, "rows have no scales of their own");
    const float2 of_column = biases(expert, column);
    return from_float<T>(activated(of_column, gate.x, up.x)) |
           uint32_t(from_float<T>(activated(of_column, gate.y, up.y))) << 16;
  }

  // Of a row of bytes, columns that are eight apart, `column` the first; their results lie side by side, from `place`
  // on. Nothing is stored of a slot below 0.
  template <int kCount, class Expert>
  __device__ __forceinline__ void store_places(Expert expert, int slot, float2 factors, int column, int place,
                                               float (&gate)[kCount], float (&up)[kCount]) const {
    static_assert(!kSame<Intermediate, DynamicNvfp4>, "neighbours share nothing");
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const int at = 2 * i;
#pragma unroll
      for (int b = at; b < at + 2; ++b) {
        gate[b] *= factors.x, up[b] *= factors.x;
        finish(biases(expert, column + 8 * b), gate[b], up[b]);
      }
      float2 values = Quick<Activation>::apply(float2{gate[at], gate[at + 1]}, float2{up[at], up[at + 1]});
      if constexpr (Intermediate::kQuantizes) {
        Intermediate::apply(values.x, values.y, usable_scale(intermediate_scales[expert]));
      }
      words[i] = from_float<T>(values.x) | uint32_t(from_float<T>(values.y)) << 16;
    }
    if (slot >= 0) store_words(reinterpret_cast<uint32_t*>(out + int64_t(slot) * kColumns + place), words);
  }

  template <class Expert>
  __device__ __forceinline__ void store_pair(Expert expert, int slot, float factor, int column, float2 gate, float2 up,
                                             float2 biases, float2 next_biases) const {
    if constexpr (kRowScaled) gate.x *= factor, gate.y *= factor, up.x *= factor, up.y *= factor;
    float first = activated(biases, gate.x, up.x), second = activated(next_biases, gate.y, up.y);
    Intermediate::apply(first, second, usable_scale(intermediate_scales[expert]));
    T* row = out + int64_t(slot) * kColumns + column;
    row[0].bits = from_float<T>(first), row[8].bits = from_float<T>(second);
  }
};

// out[slot, column] = (sum + bias) * router weight, rounded to T.
template <class Facts>
struct SlotRows {
  using T = typename Facts::Element;  // of the result
  static constexpr int kColumns = Facts::kColumns;
  static constexpr bool kBias = Facts::kBias;          // whether there is a bias
  static constexpr bool kWeighted = Facts::kWeighted;  // whether there are router weights

  T* __restrict__ out;                     // [slots, kColumns]
  const float* __restrict__ bias;          // [experts, kColumns] if kBias
  const float* __restrict__ topk_weights;  // [slots] if kWeighted

  static constexpr bool kGated = false;

  __device__ __forceinline__ float factor(int slot) const {
    if constexpr (kWeighted) return topk_weights[slot];
    return 1.0f;
  }

  template <class Expert>
  __device__ __forceinline__ const float* bias_of(Expert expert, int, int column) const {
    return bias + expert * kColumns + column;
  }

  template <class Expert>
  __device__ __forceinline__ float2 biases(Expert expert, int column) const {
    if constexpr (!kBias) return float2{};
    return {*bias_of(expert, 0, column), 0.0f};
  }

  __device__ __forceinline__ float finished(float2 biases, float factor, float sum) const {
    if constexpr (kBias) sum += biases.x;
    if constexpr (kWeighted) sum *= factor;
    return sum;
  }
  template <class Expert>
  __device__ __forceinline__ void store(Expert, int slot, float factor, int column, float sum, float,
                                        float2 biases) const {
    out[int64_t(slot) * kColumns + column].bits = from_float<T>(finished(biases, factor, sum));
  }

  // As for `Activated`.
  template <class Expert>
  __device__ __forceinline__ uint32_t of_two_rows(Expert expert, float2 row_factors, int column, float2 sums,
                                                  float2) const {
    const float2 of_column = biases(expert, column);
    return from_float<T>(finished(of_column, row_factors.x, sums.x)) |
           uint32_t(from_float<T>(finished(of_column, row_factors.y, sums.y))) << 16;
  }
};

// With rows of bytes: what partial sums of a slot are multiplied by before the bias, and behind it.
template <class Partials>
__device__ __forceinline__ float2 factors_around_bias(const Partials& partials, int slot) {
  if constexpr (Partials::kRowScaled && Partials::kBias) return {partials.row_scales[slot], partials.factor(slot)};
  if constexpr (Partials::kRowScaled) return {partials.factor(slot), 1.0f};
  return {1.0f, partials.factor(slot)};
}

// From the sum of a column to what is stored of it, with these factors.
template <class Partials, class Expert>
__device__ __forceinline__ void finish_sum(const Partials& partials, Expert expert, float2 factors, int column,
                                           float& sum) {
  if constexpr (Partials::kScaled) sum *= usable_scale(partials.intermediate_scales[expert]);
  if constexpr (Partials::kRowScaled) sum *= factors.x;
  if constexpr (Partials::kBias) sum += partials.bias[expert * Partials::kBiasColumns + column];
  if constexpr (Partials::kBias || !Partials::kRowScaled) sum *= factors.y;
}

// The same in float32, for the sum over a token's experts that follows.
template <class Facts>
struct SlotPartials {
  static constexpr int kColumns = Facts::kColumns;
  static constexpr int kBiasColumns = Facts::kBiasColumns;  // from one expert's bias to the next
  static constexpr bool kBias = Facts::kBias;               // whether there is a bias
  static constexpr bool kWeighted = Facts::kWeighted;       // whether there are router weights
  static constexpr bool kScaled = Facts::kScaled;           // whether rows are in units of their expert's scale
  static constexpr bool kRowScaled = Facts::kRowScaled;     // whether each is in units of its own

  float* __restrict__ out;                        // [slots, kColumns]
  const float* __restrict__ bias;                 // [experts, kBiasColumns], from the first column on, if kBias
  const float* __restrict__ topk_weights;         // [slots] if kWeighted
  const float* __restrict__ intermediate_scales;  // [experts] if kScaled
  const float* row_scales;                        // [slots] if kRowScaled, of the kernel before

  static constexpr bool kGated = false;

  static constexpr bool kJoins = kRowScaled && !kBias;  // whether the row's scale is part of its factor
  __device__ __forceinline__ float factor(int slot) const {
    float product = 1.0f;
    if constexpr (kWeighted) product = topk_weights[slot];
    if constexpr (kJoins) product *= row_scales[slot];
    return product;
  }
  __device__ __forceinline__ float2 both_factors(int slot) const { return factors_around_bias(*this, slot); }

  template <class Expert>
  __device__ __forceinline__ const float* bias_of(Expert expert, int, int column) const {
    return bias + expert * kBiasColumns + column;
  }

  template <class Expert>
  __device__ __forceinline__ float2 biases(Expert expert, int column) const {
    if constexpr (!kBias) return float2{};
    return {*bias_of(expert, 0, column), 0.0f};
  }

  template <class Expert>
  __device__ __forceinline__ void store(Expert expert, int slot, float factor, int column, float sum, float,
                                        float2 biases) const {
    if constexpr (kScaled) sum *= usable_scale(intermediate_scales[expert]);
    if constexpr (kRowScaled && !kJoins) sum *= row_scales[slot];
    if constexpr (kBias) sum += biases.x;
    if constexpr (kWeighted || kJoins) sum *= factor;
    out[int64_t(slot) * kColumns + column] = sum;
  }

  // As for `Activated`.
  template <int kCount, class Expert>
  __device__ __forceinline__ void store_places(Expert expert, int slot, float2 factors, int column, int place,
                                               float (&sums)[kCount], float (&)[kCount]) const {
    uint32_t words[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      finish_sum(*this, expert, factors, column + 8 * i, sums[i]);
      words[i] = __float_as_uint(sums[i]);
    }
    if (slot >= 0) store_words(reinterpret_cast<uint32_t*>(out + int64_t(slot) * kColumns + place), words);
  }
};

// `SlotPartials` with four columns in 64 bits (four_columns.cuh), the first of which is `column`.
template <class Facts>
struct PackedPartials {
  static constexpr int kColumns = Facts::kColumns, kBiasColumns = Facts::kBiasColumns;
  static constexpr bool kBias = Facts::kBias, kWeighted = Facts::kWeighted, kScaled = Facts::kScaled;  // as there
  static constexpr bool kRowScaled = Facts::kRowScaled, kPairs = Facts::kPairs;
  using Places = PlacesOfFour<kPairs>;

  float* __restrict__ out;                        // [slots, kColumns / 4] of uint2
  const float* __restrict__ bias;                 // as in SlotPartials
  const float* __restrict__ topk_weights;         // likewise
  const float* __restrict__ intermediate_scales;  // likewise
  const float* row_scales;                        // likewise

  static constexpr bool kGated = false;

  static constexpr bool kJoins = kRowScaled && !kBias;  // whether the row's scale is part of its factor
  __device__ __forceinline__ float factor(int slot) const {
    float product = 1.0f;
    if constexpr (kWeighted) product = topk_weights[slot];
    if constexpr (kJoins) product *= row_scales[slot];
    return product;
  }
  __device__ __forceinline__ float2 both_factors(int slot) const { return factors_around_bias(*this, slot); }

  // The vector of the first slot that begins with a column, not made anew for each row.
  __device__ __forceinline__ uint2* vectors_from(int column) const {
    return opaque(reinterpret_cast<uint2*>(out) + Places::vector_of(column));
  }

  // Four columns behind the one that `vectors` are from, whose sums have yet to be multiplied by `residual`. Nothing is
  // stored of a slot below 0.
  template <int kBehind, class Expert>
  __device__ __forceinline__ void store_four(Expert expert, int slot, float residual, float factor, uint2* vectors,
                                             int column, float (&sums)[4]) const {
    if constexpr (!kBias && (kWeighted || kJoins)) residual *= factor;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sums[c] *= residual;
      if constexpr (kScaled) sums[c] *= usable_scale(intermediate_scales[expert]);
      if constexpr (kRowScaled && !kJoins) sums[c] *= row_scales[max(slot, 0)];
      if constexpr (kBias) sums[c] += bias[expert * kBiasColumns + column + kBehind + Places::offset(c)];
      if constexpr (kBias && kWeighted) sums[c] *= factor;
    }
    const uint2 packed = FourColumns::pack(sums[0], sums[1], sums[2], sums[3]);
    static_assert(kBehind % Places::kGroup == 0, "whole groups of columns behind");
    if (slot >= 0) vectors[uint64_t(uint32_t(slot)) * (kColumns / 4) + kBehind / 4] = packed;
  }

  // As for `Activated`; the columns are those of `store_four`, whatever their places.
  template <int kCount, class Expert>
  __device__ __forceinline__ void store_places(Expert expert, int slot, float2 factors, int column, int,
                                               float (&sums)[kCount], float (&)[kCount]) const {
    static_assert(kCount % 4 == 0 && !kPairs, "whole fours");
    uint2* const row = reinterpret_cast<uint2*>(out) + int64_t(slot) * (kColumns / 4);
#pragma unroll
    for (int f = 0; f < kCount; f += 4) {
#pragma unroll
      for (int c = f; c < f + 4; ++c) finish_sum(*this, expert, factors, column + 8 * c, sums[c]);
      const uint2 packed = FourColumns::pack(sums[f], sums[f + 1], sums[f + 2], sums[f + 3]);
      if (slot >= 0) row[Places::vector_of(column + 8 * f)] = packed;
    }
  }
};
template <class Epilogue>
constexpr bool kPacksFour = false;
template <class Facts>
constexpr bool kPacksFour<PackedPartials<Facts>> = true;

// Whether an epilogue needs the two columns of a lane, and those of the lanes beside it, at once.
template <class Epilogue>
constexpr bool kQuantizes = false;
template <class Facts>
constexpr bool kQuantizes<Activated<Facts>> = Activated<Facts>::Intermediate::kQuantizes;

// Whether results are 16 bits that pairs of rows can exchange: not quantised.
template <class Epilogue>
constexpr bool kExchangesRows = false;
template <class Facts>
constexpr bool kExchangesRows<SlotRows<Facts>> = true;
template <class Facts>
constexpr bool kExchangesRows<Activated<Facts>> = !kQuantizes<Activated<Facts>> && !Activated<Facts>::kRowScaled;

// Stores words of two columns each, side by side in the row of a slot from `column` on; nothing if the slot is below 0.
// There is no branch between rows, so they overlap.
template <int kColumns, class T, int kWords>
__device__ __forceinline__ void store_columns(T* out, int slot, int column, const uint32_t (&words)[kWords]) {
  static_assert(sizeof(T) == 2 && kColumns % (2 * kWords) == 0, "words are aligned");
  if (slot >= 0) store_words(reinterpret_cast<uint32_t*>(out + column + uint64_t(uint32_t(slot)) * kColumns), words);
}

// Asks for the biases of kCount columns from `column` on, in each half, which are wanted at the end of a work tile:
// they come from memory, and each load of them would wait for it. A lane has a line of them.
template <int kCount, class Epilogue, class Expert>
__device__ __forceinline__ void fetch_biases(const Epilogue& epilogue, Expert expert, int column, int lane) {
  if constexpr (Epilogue::kBias) {
    constexpr int kLine = 32, kLines = (kCount + kLine - 1) / kLine, kHalves = Epilogue::kGated ? 2 : 1;
    static_assert(kLines * kHalves <= 32, "a lane for each");
    if (lane < kLines * kHalves) fetch_to_l2(epilogue.bias_of(expert, lane / kLines, column + lane % kLines * kLine));
  }
}

// Of gate and up, or of the only half, in x and y: those of columns `column` and `column + 8`.
struct PairBiases {
  float2 first, second;
};
template <class Epilogue, class Expert>
__device__ __forceinline__ PairBiases pair_biases(const Epilogue& epilogue, Expert expert, int column) {
  return {epilogue.biases(expert, column), epilogue.biases(expert, column + 8)};
}

// Columns `column` and `column + 8` of a slot, in x and y. The lanes of equal lane % 4 call it together.
template <class Epilogue, class Expert>
__device__ __forceinline__ void store_pair(const Epilogue& epilogue, Expert expert, int slot, float factor, int column,
                                           float2 first, float2 second, const PairBiases& biases) {
  if constexpr (kQuantizes<Epilogue>) {
    epilogue.store_pair(expert, slot, factor, column, first, second, biases.first, biases.second);
  } else {
    epilogue.store(expert, slot, factor, column, first.x, second.x, biases.first);
    epilogue.store(expert, slot, factor, column + 8, first.y, second.y, biases.second);
  }
}

}  // namespace jmm
