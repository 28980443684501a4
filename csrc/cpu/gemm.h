// The contract between the CPU path and its instruction-set kernels: plain data and declarations only.
//
// Files compiled for one instruction set include this header, so it must not define functions: an inline
// function emitted there could be the copy that the linker keeps for the whole module.
#ifndef JAX_MARLIN_MOE_CPU_GEMM_H_
#define JAX_MARLIN_MOE_CPU_GEMM_H_

#include <cstdint>

namespace jax_marlin_moe::cpu {

constexpr int kTileK = 16;        // contraction extent of a packed tile
constexpr int kChunk = 64;        // columns of a packed tile
constexpr int kTileWords = 128;   // 32-bit words of a packed tile
constexpr int kPanelRows = 16;    // most rows that one panel holds
constexpr int kPanelChunks = 10;  // most column chunks that one panel holds

// A 16-bit floating-point type, stored as its bit pattern.
enum class Element { kBf16, kF16 };

// One expert's quantised matrix W = (q - zero) * scale, q 4-bit codes in Marlin tiles.
struct ExpertMatrix {
  const int32_t* packed;   // [k / 16, n * 2]
  const uint16_t* scales;  // [groups, n], Marlin grouped order: column c of a chunk at 8 * (c % 8) + c / 8
  const int32_t* zeros;    // [groups, n / 8], Marlin order; null: every zero point is 8
  int64_t k;
  int64_t n;
  int64_t groups;
  Element scale_type;
};

// A few rows of x times some column chunks of one expert.
struct Panel {
  ExpertMatrix weight;
  const uint16_t* const* x;  // `rows` pointers to rows of k elements
  Element x_type;
  int rows;                     // 1 ... kPanelRows
  int chunks;                   // 1 ... kPanelChunks
  int64_t chunk[kPanelChunks];  // `chunks` indices: columns chunk[i] * kChunk and up
  float* out;                   // [rows, chunks * kChunk], plain column order inside a chunk; overwritten
};

// Computes panel.out. A row's result has the same bits whichever rows and columns share its panel.
using PanelKernel = void (*)(const Panel& panel);

void PortablePanel(const Panel& panel);
#if defined(__x86_64__)
void Avx2Panel(const Panel& panel);
void Avx512Panel(const Panel& panel);
void Avx512Bf16Panel(const Panel& panel);
#endif

// The fastest kernel that this processor runs.
PanelKernel ActivePanelKernel();

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_GEMM_H_
