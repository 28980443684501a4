// The contract between the CPU path and its instruction-set kernels: plain data and declarations only.
//
// Files compiled for one instruction set include this header, so it must not define functions: an inline
// function emitted there could be the copy that the linker keeps for the whole module.
#ifndef JAX_MARLIN_MOE_CPU_GEMM_H_
#define JAX_MARLIN_MOE_CPU_GEMM_H_

#include <cstdint>

namespace jax_marlin_moe::cpu {

constexpr int kTileK = 16;       // contraction extent of a packed tile
constexpr int kUnit = 64;        // columns of a packed tile
constexpr int kPanelRows = 16;   // most rows that one panel holds
constexpr int kPanelUnits = 10;  // most units that one panel holds

// A 16-bit floating-point type, stored as its bit pattern.
enum class Element { kBf16, kF16 };

// Codes that are floats of 8 bits, of sign, exponent and mantissa: X(name, name in calls, bits of the exponent). What
// else depends on the type follows from this list.
#define JMM_FLOAT_BYTES(X) X(E4M3, "e4m3", 4)

// What a code means before its zero point and scale; of 16 bits, the weight itself. Patterns of NaN and infinity of 8
// bits read on as numbers, those of e4m3 as +-480.
#define JMM_CODE(name, call_name, exponent_bits) , k##name
enum class Code { kInt4, kInt8, kE2M1, kBf16, kFp16 JMM_FLOAT_BYTES(JMM_CODE) };
#undef JMM_CODE

// How scales are stored: floats, or bit patterns of one byte (e8m0 is 2^(bits - 127), 255 is NaN).
enum class Scale { kBf16, kF16, kF32, kE4M3, kE8M0 };

// What groups store as zero points: nothing, codes in Marlin order, or floats in type and order of the scales.
enum class Zeros { kNone, kInteger, kFloat };

// One expert's quantised matrix W = (value(code) - zero) * scale in Marlin tiles. A group is `group_size` rows of k,
// the last one what is left of them.
struct ExpertMatrix {
  const int32_t* packed;  // [k / 16, n * 16 * bits / 32]
  const void* scales;     // [groups, n], Marlin grouped order: column c of a unit at 8 * (c % 8) + c / 8
  const void* zeros;      // [groups, n * bits / 32] words or [groups, n] floats
  int64_t k;
  int64_t n;
  int64_t groups;
  int64_t group_size;  // a multiple of 16
  float zero_point;    // of every group, where none is stored
  Code code;
  Scale scale_type;
  Zeros zeros_type;
};

// A few rows of x times some units of one expert.
struct Panel {
  ExpertMatrix weight;
  const uint16_t* const* x;  // `rows` pointers to rows of k elements
  Element x_type;
  int rows;                   // 1 ... kPanelRows
  int units;                  // 1 ... kPanelUnits
  int64_t unit[kPanelUnits];  // `units` indices: columns unit[i] * kUnit and up
  float* out;                 // [rows, units * kUnit], plain column order inside a unit; overwritten
};

// Computes panel.out: x @ W, without global scales and bias. A row's result has the same bits whichever rows and
// columns share its panel.
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
