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
struct E4M3 {
  static constexpr int kBits = 8;
};

}  // namespace jmm
