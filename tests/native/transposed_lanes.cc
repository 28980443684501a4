// The transposed kernel with vectors of any width, whatever this processor has: LANES is defined by the build. Wider
// vectors than the instruction set's are lowered to several of its own, so the arrangement of lanes is that of the
// kernels for wider registers.
#define JMM_TRANSPOSED_LANES LANES
#include "cpu/transposed_segment.h"

extern "C" void run(const int32_t* words, int64_t tile_stride, int tiles, int units, int code, const float* x, int rows,
                    float* out) {
  using namespace jax_marlin_moe::cpu;
  TransposedSegment segment;
  segment.words = words;
  segment.tile_stride = tile_stride;
  segment.tiles = tiles;
  segment.units = units;
  segment.code = static_cast<Code>(code);
  segment.x = x;
  segment.rows = rows;
  segment.out = out;
  segment.out_stride = tiles * kTileK;
  RunSegment(segment);
}
