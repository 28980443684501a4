// The choice of experts, and behind it the list of slots grouped by expert, without a kernel between them: the last CTA
// that has chosen makes the list. The kernel before has cleared the number of those that have.
#pragma once

#include "align.cuh"
#include "router/select.cuh"

namespace jmm {

// Facts: jax_marlin_moe/cuda/kernels/select_and_align.py.
template <class Facts, class AlignFacts>
struct SelectAndAlign {
  using Select = RouterSelect<Facts>;
  using Align = AlignBlockSize<AlignFacts>;
  static constexpr int kThreads = Select::kThreads, kMaxCtas = Select::kMaxCtas;
  static constexpr int kSharedBytes =
      Select::kSharedBytes > Align::kSharedBytes ? Select::kSharedBytes : Align::kSharedBytes;
  static_assert(Align::kThreads == kThreads && Align::kMaxCtas == 1 && Align::Parts::kFresh, "one CTA of these");
  static_assert(Align::kSlots == Select::kTokens * Select::kSlots, "all slots of the choice");

  Select select;
  const int32_t* __restrict__ expert_map;        // as AlignBlockSize has it
  int32_t* finished;                             // [1] CTAs that have chosen
  int32_t* __restrict__ sorted_token_ids;        // as AlignBlockSize has it
  int32_t* __restrict__ expert_ids;              // likewise
  int32_t* __restrict__ num_tokens_post_padded;  // likewise

  __device__ void run(unsigned char* shared_bytes) const {
    select.run(shared_bytes);
    if (is_last(*reinterpret_cast<int*>(shared_bytes))) {
      const Align align{{select.topk_ids, expert_map, select.count}, nullptr, sorted_token_ids, expert_ids, num_tokens_post_padded};
      align.run(shared_bytes);
    }
  }

 private:
  // Whether this is the last CTA to come here; what all of them have written before is there for it.
  __device__ __forceinline__ bool is_last(int& order) const {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) order = atomicAdd(finished, 1);
    __syncthreads();
    const bool last = order == kMaxCtas - 1;
    __syncthreads();  // shared memory is free again
    __threadfence();
    return last;
  }
};

}  // namespace jmm
