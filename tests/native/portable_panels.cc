// In place of the kernels of instruction sets that are not compiled, as a sanitizer takes long for them. Those that are
// have a macro of their name.
#include "cpu/gemm.h"
#include "cpu/transposed.h"

namespace jax_marlin_moe::cpu {

#if defined(__x86_64__)
#if !defined(WITH_AVX2)
void Avx2Panel(const Panel& panel) { PortablePanel(panel); }
void Avx2Transposed(const TransposedSegment& segment) { PortableTransposed(segment); }
#endif
#if !defined(WITH_AVX512)
void Avx512Panel(const Panel& panel) { PortablePanel(panel); }
void Avx512Transposed(const TransposedSegment& segment) { PortableTransposed(segment); }
#endif
#if !defined(WITH_AVX512BF16)
void Avx512Bf16Panel(const Panel& panel) { PortablePanel(panel); }
#endif
#endif

}  // namespace jax_marlin_moe::cpu
