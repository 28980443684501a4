// Which rows a token tile has: read from the aligned list of slots, directly from topk_ids where hardly two slots share
// an expert, or grouped by every CTA for itself where slots are few (docs/kernels.md, "Which rows a token tile has").
// Rows that follow each other in memory are read from a table of dispatches, or are all of one expert.
//
// Each way has a type `Reader`, made once by all threads of a CTA: how many token tiles there are, the expert of each
// (-1 where it has nothing to do), the slot of each row (-1 where it is padding), and how many rows of x behind that of
// its slot a row reads. Facts: jax_marlin_moe/cuda/kernels/token_tiles.py.
#pragma once

#include "token_tiles/aligned.cuh"
#include "token_tiles/direct.cuh"
#include "token_tiles/dispatched.cuh"
#include "token_tiles/grouped.cuh"
#include "token_tiles/one_expert.cuh"
#include "token_tiles/ragged.cuh"

namespace jmm {

// Whether token tiles are in the order of their experts.
template <class TokenTiles>
constexpr bool kAscendExperts = false;
template <class Facts>
constexpr bool kAscendExperts<AlignedTiles<Facts>> = true;
template <class Facts>
constexpr bool kAscendExperts<GroupedTiles<Facts>> = true;

}  // namespace jmm
