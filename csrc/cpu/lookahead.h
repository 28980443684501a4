// What a panel kernel asks memory for while it multiplies something else: packed tiles and the scales of their groups.
//
// A kernel takes a few tiles along k (a segment) of each of its units, then the next few of each. Hardware follows
// neither the jumps from unit to unit nor those from one group's scales to the next one's.
//
// Included by one file per instruction set, so everything has internal linkage: a shared function could be kept from
// the wrong file.
#ifndef JAX_MARLIN_MOE_CPU_LOOKAHEAD_H_
#define JAX_MARLIN_MOE_CPU_LOOKAHEAD_H_

#include <immintrin.h>

#include "cpu/gemm.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kPrefetchTiles = 16;  // how far ahead memory is asked for
constexpr int kLineBytes = 64;      // what one request brings

// The segment of a unit that comes kPrefetchTiles tiles after the one at hand.
class Lookahead {
 public:
  // At `count` tiles from `first_tile` on of the panel's first unit.
  Lookahead(const Panel& panel, int64_t first_tile, int count) : panel_(panel), count_(count), tile_(first_tile) {
    step_ = (kPrefetchTiles + count - 1) / count;
    for (; step_ >= panel.units; step_ -= panel.units) tile_ += count;
    group_ = tile_ * kTileK / panel.weight.group_size;
  }

  // To the next unit.
  void Advance() {
    if (++step_ < panel_.units) return;
    step_ = 0;
    tile_ += count_;
    group_ = tile_ * kTileK / panel_.weight.group_size;
  }

  // Words from `tiles`, first of the segment at hand, to the first of that segment; 0 past the end of the matrix.
  int64_t Words(const int32_t* tiles, int64_t tile_words) const {
    const ExpertMatrix& weight = panel_.weight;
    if (tile_ * kTileK >= weight.k) return 0;
    return weight.packed + (tile_ * (weight.n / kUnit) + panel_.unit[step_]) * tile_words - tiles;
  }

  // Asks for the scales and zero points of that segment.
  void PrefetchScales(int bits) const {
    const ExpertMatrix& weight = panel_.weight;
    if (tile_ * kTileK >= weight.k) return;
    const int64_t first = group_ * weight.n + panel_.unit[step_] * kUnit;
    const bool is_byte = weight.scale_type == Scale::kE4M3 || weight.scale_type == Scale::kE8M0;
    const int width = is_byte ? 1 : weight.scale_type == Scale::kF32 ? 4 : 2;
    Prefetch(static_cast<const char*>(weight.scales) + first * width, kUnit * width);
    if (weight.zeros_type == Zeros::kInteger) {
      Prefetch(static_cast<const char*>(weight.zeros) + first * bits / 8, kUnit * bits / 8);
    } else if (weight.zeros_type == Zeros::kFloat) {
      Prefetch(static_cast<const char*>(weight.zeros) + first * width, kUnit * width);
    }
  }

 private:
  static void Prefetch(const char* address, int bytes) {
    for (int offset = 0; offset < bytes; offset += kLineBytes) _mm_prefetch(address + offset, _MM_HINT_T0);
  }

  const Panel& panel_;
  int count_;
  int step_;  // of the panel's units
  int64_t tile_;
  int64_t group_;
};

}  // namespace
}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_LOOKAHEAD_H_
