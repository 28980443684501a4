// The types of codes: integers stored for weights. docs/formats.md, "Weight formats", says what their bits mean.
#pragma once

namespace jmm {

struct Int4 {
  static constexpr int kBits = 4;
};
struct Int8 {
  static constexpr int kBits = 8;
};
struct E2M1 {
  static constexpr int kBits = 4;
};
// Floats of 8 bits, of sign, exponent and mantissa.
struct E4M3 {
  static constexpr int kBits = 8, kExponentBits = 4;
};
// The weights themselves, in 16 bits.
struct BF16 {
  static constexpr int kBits = 16;
};
struct FP16 {
  static constexpr int kBits = 16;
};

}  // namespace jmm
