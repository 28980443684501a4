// Picks the kernels for this processor, once.
//
// JAX_MARLIN_MOE_CPU_ISA = portable | avx2 | avx512 | avx512bf16 overrides the choice, for tests and for
// comparing kernels. It is read at the first call; a name that is unknown, or an instruction set that the
// processor lacks, leaves the choice as it would have been.
#include <cstdlib>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/transposed.h"

namespace jax_marlin_moe::cpu {
namespace {

struct Candidate {
  const char* name;
  PanelKernel panel;
  TransposedKernel transposed;
  bool supported;
};

Candidate Choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  // Best first.
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {"avx512bf16", Avx512Bf16Panel, Avx512Transposed, avx512bf16},
      {"avx512", Avx512Panel, Avx512Transposed, avx512},
      {"avx2", Avx2Panel, Avx2Transposed, avx2},
#endif
      {"portable", PortablePanel, PortableTransposed, true},
  };
  const char* wanted = std::getenv("JAX_MARLIN_MOE_CPU_ISA");
  const Candidate* best = nullptr;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    if (wanted != nullptr && std::strcmp(wanted, candidate.name) == 0) return candidate;
    if (best == nullptr) best = &candidate;
  }
  return *best;
}

const Candidate& Active() {
  static const Candidate chosen = Choose();
  return chosen;
}

}  // namespace

PanelKernel ActivePanelKernel() { return Active().panel; }

TransposedKernel ActiveTransposedKernel() { return Active().transposed; }

}  // namespace jax_marlin_moe::cpu
