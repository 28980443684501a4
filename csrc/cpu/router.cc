// Products, scores and choices of the router.
#include "cpu/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/align.h"
#include "cpu/element.h"
#include "cpu/scratch.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int64_t kExpertsOfItem = 64;  // columns of a work item of the product
constexpr int64_t kTokensOfItem = 8;    // that share the conversion of the router's numbers

void Softmax(float* values, int64_t count) {
  float most = values[0];
  for (int64_t i = 1; i < count; ++i) most = most > values[i] || most != most ? most : values[i];
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - most);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
}

void Sigmoids(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = Sigmoid(values[i]);
}

void SqrtSoftplus(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float v = values[i];
    values[i] = std::sqrt((v > 0.0f || v != v ? v : 0.0f) + std::log1p(std::exp(-std::abs(v))));
  }
}

void Identity(float*, int64_t) {}

constexpr Scoring kScorings[] = {
    {"softmax", Softmax, Weights::kScores},           {"sigmoid", Sigmoids, Weights::kScores},
    {"sqrtsoftplus", SqrtSoftplus, Weights::kScores}, {"identity", Identity, Weights::kScores},
    {"chosen_sigmoid", Identity, Weights::kSigmoids}, {"sparsemixer", Identity, Weights::kMixed},
};

// Larger for larger numbers, with NaN at both ends.
int32_t Key(float value) {
  const auto bits = static_cast<int32_t>(BitsFromFloat(value));
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}

// The first `count` of the `size` places in `order` become those of the largest values, in descending order, ties to
// the lower place.
void TakeLargest(const float* values, int64_t size, int64_t count, int32_t* order) {
  std::iota(order, order + size, 0);
  std::partial_sort(order, order + count, order + size, [&](int32_t a, int32_t b) {
    const int32_t first = Key(values[a]), second = Key(values[b]);
    return first != second ? first > second : a < b;
  });
}

// A token's row, normed and scaled for the router.
void NormItem(const Router& router, int64_t token, float* out) {
  router.rows.Read(token * router.row_stride, router.hidden, out);
  float squares = 0.0f;
  for (int64_t k = 0; k < router.hidden; ++k) squares += out[k] * out[k];
  const auto hidden = static_cast<float>(router.hidden);
  const float norm = 1.0f / std::sqrt(squares / hidden + router.norm_epsilon), root = 1.0f / std::sqrt(hidden);
  for (int64_t k = 0; k < router.hidden; ++k) out[k] = out[k] * norm * router.input_scale[k] * root;
}

// Columns [begin, end) of the logits of some tokens, without the bias.
void ProductItem(const Router& router, int64_t first_token, int64_t tokens, int64_t begin, int64_t end, float* logits) {
  const int64_t width = end - begin;
  float sums[kTokensOfItem][kExpertsOfItem] = {};
  float weights[kExpertsOfItem];
  for (int64_t k = 0; k < router.hidden; ++k) {
    router.kernel.Read(k * router.experts + begin, width, weights);
    for (int64_t t = 0; t < tokens; ++t) {
      const float x = router.rows[(first_token + t) * router.row_stride + k];
      for (int64_t e = 0; e < width; ++e) sums[t][e] += x * weights[e];
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    std::copy_n(sums[t], width, logits + (first_token + t) * router.experts + begin);
  }
}

// What a token's choice works in.
struct ChoiceScratch {
  float* choice;   // [experts]
  float* worth;    // [num_groups]
  int32_t* order;  // [experts]
};

// Leaves in the choice what the best groups have.
void MaskGroups(const Router& router, const ChoiceScratch& scratch) {
  const int64_t size = router.experts / router.num_groups;
  for (int64_t g = 0; g < router.num_groups; ++g) {
    const float* group = scratch.choice + g * size;
    const int64_t best = router.top2 && size > 1 ? 2 : 1;
    TakeLargest(group, size, best, scratch.order);
    scratch.worth[g] = group[scratch.order[0]] + (best == 2 ? group[scratch.order[1]] : 0.0f);
  }
  TakeLargest(scratch.worth, router.num_groups, router.top_groups, scratch.order);
  for (int64_t g = 0; g < router.num_groups; ++g) {
    const int32_t* end = scratch.order + router.top_groups;
    if (std::find(static_cast<const int32_t*>(scratch.order), end, g) != end) continue;
    std::fill_n(scratch.choice + g * size, size, -std::numeric_limits<float>::infinity());
  }
}

// The j-th chosen score's softmax over itself and those close to it that are not chosen before it.
float MixedWeight(const Router& router, const float* scores, const int32_t* ids, int64_t j) {
  const float top = scores[ids[j]];
  float sum = 0.0f;
  for (int64_t e = 0; e < router.experts; ++e) {
    // Not `<=`: where all are zero, the quotient is NaN, and they are close.
    const bool far = (top - scores[e]) / std::max(std::abs(scores[e]), top) > 2 * router.jitter;
    if (!far && std::find(ids, ids + j, e) == ids + j) sum += std::exp(scores[e] - top);
  }
  return 1.0f / sum;
}

// One token, whose logits become scores.
void Choose(const Router& router, int64_t token, float* scores, const ChoiceScratch& scratch) {
  const int64_t experts = router.experts, top_k = router.top_k;
  for (int64_t e = 0; e < experts; ++e) {
    if (router.bias.data != nullptr) scores[e] += router.bias[e];
    if (router.soft_cap > 0.0f) scores[e] = std::tanh(scores[e] / router.soft_cap) * router.soft_cap;
  }
  router.scoring->apply(scores, experts);
  int32_t* const ids = router.topk_ids + token * top_k;
  float* const weights = router.topk_weights + token * top_k;
  if (router.given != nullptr) {
    std::copy_n(router.given + token * top_k, top_k, ids);
  } else {
    for (int64_t e = 0; e < experts; ++e) {
      scratch.choice[e] = scores[e] + (router.correction_bias.data == nullptr ? 0.0f : router.correction_bias[e]);
    }
    if (router.top_groups < router.num_groups) MaskGroups(router, scratch);
    TakeLargest(scratch.choice, experts, top_k, scratch.order);
    std::copy_n(scratch.order, top_k, ids);
  }

  const auto there = [&](int64_t j) { return ids[j] >= 0 && ids[j] < experts; };
  const float nothing = router.softmax_after_topk ? -std::numeric_limits<float>::infinity() : 0.0f;
  for (int64_t j = 0; j < top_k; ++j) {
    weights[j] = there(j) ? scores[ids[j]] : nothing;
    if (!there(j)) continue;
    if (router.scoring->weights == Weights::kSigmoids) weights[j] = Sigmoid(weights[j]);
    if (router.scoring->weights == Weights::kMixed) weights[j] = MixedWeight(router, scores, ids, j);
  }
  if (router.softmax_after_topk) {
    Softmax(weights, top_k);
  } else if (router.renormalize) {
    float sum = 0.0f;
    for (int64_t j = 0; j < top_k; ++j) sum += weights[j];
    for (int64_t j = 0; j < top_k; ++j) weights[j] /= sum + router.renormalize_epsilon;
  }
  for (int64_t j = 0; j < top_k; ++j) {
    weights[j] *= router.scale;
    if (router.expert_scale.data != nullptr && there(j)) weights[j] *= router.expert_scale[ids[j]];
    if (!there(j)) weights[j] = 0.0f;
  }
}

}  // namespace

float Sigmoid(float value) { return 1.0f / (1.0f + std::exp(-value)); }

float Numbers::operator[](int64_t i) const {
  float value;
  Read(i, 1, &value);
  return value;
}

void Numbers::Read(int64_t first, int64_t count, float* out) const {
  if (type == Number::kF32) {
    std::copy_n(static_cast<const float*>(data) + first, count, out);
  } else if (type == Number::kBf16) {
    const uint16_t* source = static_cast<const uint16_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = FloatFromBf16(source[i]);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = FloatFromF16(source[i]);
  }
}

const Scoring* FindScoring(std::string_view name) {
  for (const Scoring& scoring : kScorings) {
    if (scoring.name == name) return &scoring;
  }
  return nullptr;
}

std::string ScoringNames() {
  std::string names;
  for (const Scoring& scoring : kScorings) names += (names.empty() ? "" : ", ") + std::string(scoring.name);
  return names;
}

void RunRouter(Workers& workers, const Router& read) {
  Router router = read;
  Scratch<float> normed;
  if (read.input_scale.data != nullptr) {
    normed.resize(static_cast<size_t>(read.tokens * read.hidden));
    router.rows = {normed.data(), Number::kF32};
    router.row_stride = read.hidden;
  }
  const auto norm = [&](int64_t token) { NormItem(read, token, normed.data() + token * read.hidden); };
  Scratch<float> logits(static_cast<size_t>(router.tokens * router.experts));
  const int64_t splits = CeilDiv(router.experts, kExpertsOfItem);
  const auto product = [&](int64_t item) {
    const int64_t token = item / splits * kTokensOfItem, begin = item % splits * kExpertsOfItem;
    ProductItem(router, token, std::min(kTokensOfItem, router.tokens - token), begin,
                std::min(begin + kExpertsOfItem, router.experts), logits.data());
  };
  const auto size = static_cast<size_t>(router.tokens * router.experts);
  Scratch<float> choices(size), worths(static_cast<size_t>(router.tokens * router.num_groups));
  Scratch<int32_t> orders(size);
  const auto choose = [&](int64_t token) {
    Choose(router, token, logits.data() + token * router.experts,
           {choices.data() + token * router.experts, worths.data() + token * router.num_groups,
            orders.data() + token * router.experts});
  };
  RunPhases(workers, {{normed.empty() ? 0 : router.tokens, norm},
                      {CeilDiv(router.tokens, kTokensOfItem) * splits, product},
                      {router.tokens, choose}});
}

}  // namespace jax_marlin_moe::cpu
