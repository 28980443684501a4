// Block alignment of routed slots (docs/formats.md, "Block alignment"), and the row groups that the kernels take from
// it.
#ifndef JAX_MARLIN_MOE_CPU_ALIGN_H_
#define JAX_MARLIN_MOE_CPU_ALIGN_H_

#include <cstdint>

#include "cpu/scratch.h"

namespace jax_marlin_moe::cpu {

// ceil(a / b) without overflow, for a >= 0 and b >= 1.
inline int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

struct Routing {
  const int32_t* topk_ids;    // [slots]; ids outside [0, num_experts) are dropped
  int64_t slots;              // tokens * top_k
  int64_t num_experts;        // global
  const int32_t* expert_map;  // [num_experts] global to local, negative: remote; null: the identity
};

// The static length of sorted_token_ids, or -1 where it would not fit in int32.
int64_t AlignedLength(int64_t slots, int64_t num_experts, int64_t block_size);

struct Alignment {
  int32_t* sorted_token_ids;        // [length]
  int64_t length;                   // AlignedLength
  int32_t* expert_ids;              // [ceil(length / block_size)]
  int32_t* num_tokens_post_padded;  // [1]
};

// Fills an alignment: slots by ascending global expert, ascending inside one, padded with `slots`. Time and memory grow
// with the slots, not with num_experts, which is an attribute that no buffer backs.
void AlignBlocks(const Routing& routing, int64_t block_size, const Alignment& out);

// Rows of one expert that are computed together: entries first ... first + count - 1 of `slots`.
struct RowGroup {
  int32_t expert;  // local, in [0, num_local_experts)
  int64_t first;
  int count;
};

struct RowGroups {
  Scratch<int32_t> slots;      // every scheduled slot, once
  Scratch<uint8_t> scheduled;  // [slots of the call] whether it is among them
  Scratch<RowGroup> groups;
};

// The scheduled rows of an alignment in groups of at most `max_rows`. Slots, experts and the padded count are
// taken as untrusted: whatever is out of range is skipped, and so is every listing of a slot but the first in range.
RowGroups GroupRows(const int32_t* sorted_token_ids, int64_t length, const int32_t* expert_ids, int64_t block_size,
                    int64_t slots, int64_t num_local_experts, int max_rows);

// All rows of a routing in expert order, without padding, in groups of at most `max_rows`.
RowGroups GroupByExpert(const Routing& routing, int64_t num_local_experts, int max_rows);

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_ALIGN_H_
