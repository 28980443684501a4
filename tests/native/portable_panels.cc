// In place of the kernels of each instruction set, which take a sanitizer long to compile.
#include "cpu/gemm.h"
#include "cpu/transposed.h"

namespace jax_marlin_moe::cpu {

#if defined(__x86_64__)
void Avx2Panel(const Panel& panel) { PortablePanel(panel); }
void Avx512Panel(const Panel& panel) { PortablePanel(panel); }
void Avx512Bf16Panel(const Panel& panel) { PortablePanel(panel); }
void Avx2Transposed(const TransposedSegment& segment) { PortableTransposed(segment); }
void Avx512Transposed(const TransposedSegment& segment) { PortableTransposed(segment); }
#endif

}  // namespace jax_marlin_moe::cpu
