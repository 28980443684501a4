// The transposed kernel for processors without one of their own.
#include "cpu/transposed_segment.h"

namespace jax_marlin_moe::cpu {

void PortableTransposed(const TransposedSegment& segment) { RunSegment(segment); }

}  // namespace jax_marlin_moe::cpu
