// Block alignment by counting sort: two passes over the slots, one over the experts.
#include "cpu/align.h"

#include <algorithm>
#include <limits>

namespace jax_marlin_moe::cpu {
namespace {

// The expert that computes slot i here, or -1 where none does.
int64_t GlobalExpert(const Routing& routing, int64_t i) {
  const int64_t expert = routing.topk_ids[i];
  if (expert < 0 || expert >= routing.num_experts) return -1;
  if (routing.expert_map != nullptr && routing.expert_map[expert] < 0) return -1;
  return expert;
}

}  // namespace

int64_t AlignedLength(int64_t slots, int64_t num_experts, int64_t block_size) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (slots > kMost || num_experts > kMost || block_size > kMost) return -1;
  int64_t length = slots + num_experts * (block_size - 1);
  if (slots < num_experts) length = std::min(slots * block_size, length);
  return length > kMost ? -1 : length;
}

void AlignBlocks(const Routing& routing, int64_t block_size, const Alignment& out) {
  const int64_t blocks = CeilDiv(out.length, block_size);
  std::fill(out.sorted_token_ids, out.sorted_token_ids + out.length, static_cast<int32_t>(routing.slots));
  std::fill(out.expert_ids, out.expert_ids + blocks, -1);

  std::vector<int64_t> next(static_cast<size_t>(routing.num_experts), 0);  // counts, then where to write
  for (int64_t i = 0; i < routing.slots; ++i) {
    const int64_t expert = GlobalExpert(routing, i);
    if (expert >= 0) ++next[static_cast<size_t>(expert)];
  }
  int64_t position = 0;
  for (int64_t expert = 0; expert < routing.num_experts; ++expert) {
    const int64_t count = next[static_cast<size_t>(expert)];
    next[static_cast<size_t>(expert)] = position;
    const int64_t end = position + CeilDiv(count, block_size) * block_size;
    const int64_t local = routing.expert_map != nullptr ? routing.expert_map[expert] : expert;
    std::fill(out.expert_ids + position / block_size, out.expert_ids + end / block_size, static_cast<int32_t>(local));
    position = end;
  }
  *out.num_tokens_post_padded = static_cast<int32_t>(position);
  for (int64_t i = 0; i < routing.slots; ++i) {
    const int64_t expert = GlobalExpert(routing, i);
    if (expert >= 0) out.sorted_token_ids[next[static_cast<size_t>(expert)]++] = static_cast<int32_t>(i);
  }
}

RowGroups GroupRows(const int32_t* sorted_token_ids, int64_t length, const int32_t* expert_ids, int64_t block_size,
                    int64_t slots, int64_t num_local_experts, int max_rows) {
  RowGroups result;
  for (int64_t position = 0; position < length; ++position) {
    const int32_t slot = sorted_token_ids[position];
    const int32_t expert = expert_ids[position / block_size];
    if (slot < 0 || slot >= slots || expert < 0 || expert >= num_local_experts) continue;
    const bool joins =
        !result.groups.empty() && result.groups.back().expert == expert && result.groups.back().count < max_rows;
    if (!joins) result.groups.push_back({expert, static_cast<int64_t>(result.slots.size()), 0});
    result.slots.push_back(slot);
    ++result.groups.back().count;
  }
  return result;
}

}  // namespace jax_marlin_moe::cpu
