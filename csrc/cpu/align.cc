// Block alignment by sorting the slots that an expert computes.
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

  // Expert above slot in one number: their order is the alignment's.
  Scratch<int64_t> chosen;
  chosen.reserve(static_cast<size_t>(routing.slots));
  for (int64_t slot = 0; slot < routing.slots; ++slot) {
    const int64_t expert = GlobalExpert(routing, slot);
    if (expert >= 0) chosen.push_back(expert << 32 | slot);
  }
  std::sort(chosen.begin(), chosen.end());

  int64_t position = 0;
  for (auto next = chosen.begin(); next != chosen.end();) {
    const int64_t expert = *next >> 32;
    const int64_t first = position;
    for (; next != chosen.end() && *next >> 32 == expert; ++next) {
      out.sorted_token_ids[position++] = static_cast<int32_t>(*next & 0xFFFFFFFF);
    }
    position = first + CeilDiv(position - first, block_size) * block_size;
    const int64_t local = routing.expert_map != nullptr ? routing.expert_map[expert] : expert;
    std::fill(out.expert_ids + first / block_size, out.expert_ids + position / block_size, static_cast<int32_t>(local));
  }
  *out.num_tokens_post_padded = static_cast<int32_t>(position);
}

RowGroups GroupRows(const int32_t* sorted_token_ids, int64_t length, const int32_t* expert_ids, int64_t block_size,
                    int64_t slots, int64_t num_local_experts, int max_rows) {
  RowGroups result;
  result.scheduled = Scratch<uint8_t>(static_cast<size_t>(slots), uint8_t{0});
  for (int64_t position = 0; position < length; ++position) {
    const int32_t slot = sorted_token_ids[position];
    const int32_t expert = expert_ids[position / block_size];
    if (slot < 0 || slot >= slots || expert < 0 || expert >= num_local_experts) continue;
    uint8_t& scheduled = result.scheduled[static_cast<size_t>(slot)];
    if (scheduled) continue;
    scheduled = 1;
    const bool joins =
        !result.groups.empty() && result.groups.back().expert == expert && result.groups.back().count < max_rows;
    if (!joins) result.groups.push_back({expert, static_cast<int64_t>(result.slots.size()), 0});
    result.slots.push_back(slot);
    ++result.groups.back().count;
  }
  return result;
}

RowGroups GroupByExpert(const Routing& routing, int64_t num_local_experts, int max_rows) {
  Scratch<int32_t> sorted(static_cast<size_t>(routing.slots));
  Scratch<int32_t> experts(static_cast<size_t>(routing.slots));
  int32_t count = 0;
  AlignBlocks(routing, 1, {sorted.data(), routing.slots, experts.data(), &count});
  return GroupRows(sorted.data(), count, experts.data(), 1, routing.slots, num_local_experts, max_rows);
}

}  // namespace jax_marlin_moe::cpu
