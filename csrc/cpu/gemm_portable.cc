// The panel kernel in standard C++, for processors without one of their own, and the plainest statement of
// what the others compute. Its inner loops run over the words of a packed line, which compilers vectorise.
#include <algorithm>

#include "cpu/element.h"
#include "cpu/gemm.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kLine = 16;          // columns 16 * w + 8 * b + col of one col and b, for four t: [t = 0..3][w = 0..3]
constexpr int kRows = 4;           // rows that share one dequantisation
constexpr int kSegmentTiles = 16;  // most tiles between two applications of the scale
// The codes of a column in the words of one t have k = 2t + kOffset[j].
constexpr int kOffset[4] = {0, 1, 8, 9};

// A 4-bit word holds both halves b: code j of half b at bit kShift[j] + 8 * b.
struct Nibbles {
  static constexpr int kBits = 4;
  static uint32_t Extract(const int32_t* line, int lane, int b, int j) {
    constexpr int kShift[4] = {0, 16, 4, 20};
    return static_cast<uint32_t>(line[lane]) >> (kShift[j] + 8 * b) & 15;
  }
};

// An 8-bit word holds one half, in the order [t][w][b]: code j at bit kShift[j].
struct Bytes {
  static constexpr int kBits = 8;
  static uint32_t Extract(const int32_t* line, int lane, int b, int j) {
    constexpr int kShift[4] = {0, 16, 8, 24};
    return static_cast<uint32_t>(line[2 * lane + b]) >> kShift[j] & 255;
  }
};

// A 16-bit word holds one half of k of one half b, in the order [t][w][b][j / 2]: code j at bit 16 * (j % 2).
struct Halfwords {
  static constexpr int kBits = 16;
  static uint32_t Extract(const int32_t* line, int lane, int b, int j) {
    return static_cast<uint32_t>(line[4 * lane + 2 * b + j / 2]) >> (16 * (j % 2)) & 0xFFFF;
  }
};

// A code type: Value is its float32 less kCenter.
struct Int4 : Nibbles {
  static constexpr int kCenter = 8;
  static float Value(uint32_t code) { return static_cast<float>(static_cast<int32_t>(code) - kCenter); }
};
struct Int8 : Bytes {
  static constexpr int kCenter = 128;
  static float Value(uint32_t code) { return static_cast<float>(static_cast<int32_t>(code) - kCenter); }
};
struct E2M1 : Nibbles {
  static constexpr int kCenter = 0;
  static float Value(uint32_t code) { return FloatFromE2M1(code); }
};
template <int kExponentBits>
struct FloatByte : Bytes {
  static constexpr int kCenter = 0;
  static float Value(uint32_t code) { return FloatFromFloatByte<kExponentBits>(code); }
};

template <Element kType>
struct Whole : Halfwords {
  static constexpr int kCenter = 0;
  static float Value(uint32_t code) { return FloatFromElement(static_cast<uint16_t>(code), kType); }
};

// Entry `index` of an array of floats of some type.
float LoadFloat(const void* values, Scale type, int64_t index) {
  switch (type) {
    case Scale::kBf16:
      return FloatFromBf16(static_cast<const uint16_t*>(values)[index]);
    case Scale::kF16:
      return FloatFromF16(static_cast<const uint16_t*>(values)[index]);
    case Scale::kF32:
      return static_cast<const float*>(values)[index];
    case Scale::kE4M3:
      return FloatFromE4M3(static_cast<const uint8_t*>(values)[index]);
    case Scale::kE8M0:
      break;
  }
  return FloatFromE8M0(static_cast<const uint8_t*>(values)[index]);
}

// The zero point of column 16 * w + 8 * b + col of a unit, less what codes have already subtracted.
template <class Type>
float ZeroExcess(const ExpertMatrix& weight, int64_t group, int64_t unit, int col, int w, int b) {
  const int64_t first = group * weight.n + unit * kUnit;  // of the unit
  switch (weight.zeros_type) {
    case Zeros::kNone:
      return weight.zero_point - Type::kCenter;
    case Zeros::kFloat:
      return LoadFloat(weight.zeros, weight.scale_type, first + 8 * col + 2 * w + b) - Type::kCenter;
    case Zeros::kInteger:
      break;
  }
  const int32_t* words = static_cast<const int32_t*>(weight.zeros) + first * Type::kBits / 32;
  uint32_t code;
  if (Type::kBits == 4) {
    code = static_cast<uint32_t>(words[col]) >> (4 * w + 16 * b) & 15;
  } else {
    code = static_cast<uint32_t>(words[2 * col + w / 2]) >> (8 * (w % 2) + 16 * b) & 255;
  }
  return static_cast<float>(static_cast<int32_t>(code) - Type::kCenter);
}

// x of a tile in the order of the codes of a line: lane 4 * t + w of vector j holds x[2 * t + kOffset[j]].
struct ExpandedTile {
  float x[4][kLine];
};

// Expands `tiles` tiles of a row and returns the sum of their elements.
float Expand(const uint16_t* x, Element type, int tiles, ExpandedTile* out) {
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    float values[kTileK];
    for (int k = 0; k < kTileK; ++k) values[k] = FloatFromElement(x[tile * kTileK + k], type);
    for (int k = 0; k < kTileK; ++k) sum += values[k];
    for (int j = 0; j < 4; ++j) {
      for (int lane = 0; lane < kLine; ++lane) out[tile].x[j][lane] = values[lane / 4 * 2 + kOffset[j]];
    }
  }
  return sum;
}

// Adds scale * (value - zero) . x over `tiles` tiles of one unit to `out`.
template <class Type>
void AddSegment(const Panel& panel, int64_t unit, int64_t first_tile, int tiles, int64_t group, int rows,
                const ExpandedTile (*x)[kSegmentTiles], const float* sums, float* const* out) {
  const ExpertMatrix& weight = panel.weight;
  const int64_t tile_words = kUnit * kTileK * Type::kBits / 32;
  const int64_t tile_stride = weight.n / kUnit * tile_words;
  for (int col = 0; col < 8; ++col) {
    float acc[kRows][2][kLine] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      const int32_t* line =
          weight.packed + (first_tile + tile) * tile_stride + unit * tile_words + col * (tile_words / 8);
      for (int b = 0; b < 2; ++b) {
        for (int j = 0; j < 4; ++j) {
          float values[kLine];
          for (int lane = 0; lane < kLine; ++lane) values[lane] = Type::Value(Type::Extract(line, lane, b, j));
          for (int r = 0; r < rows; ++r) {
            for (int lane = 0; lane < kLine; ++lane) acc[r][b][lane] += values[lane] * x[r][tile].x[j][lane];
          }
        }
      }
    }
    for (int w = 0; w < 4; ++w) {
      for (int b = 0; b < 2; ++b) {
        const int64_t position = group * weight.n + unit * kUnit + 8 * col + 2 * w + b;
        const float scale = LoadFloat(weight.scales, weight.scale_type, position);
        const float excess = ZeroExcess<Type>(weight, group, unit, col, w, b);
        for (int r = 0; r < rows; ++r) {
          float dot = (acc[r][b][w] + acc[r][b][8 + w]) + (acc[r][b][4 + w] + acc[r][b][12 + w]);
          if (excess != 0) dot -= excess * sums[r];
          out[r][16 * w + 8 * b + col] += scale * dot;
        }
      }
    }
  }
}

template <class Type>
void RunPanel(const Panel& panel) {
  const ExpertMatrix& weight = panel.weight;
  const int64_t width = static_cast<int64_t>(panel.units) * kUnit;
  const int64_t group_tiles = weight.group_size / kTileK;
  const int64_t all_tiles = weight.k / kTileK;
  std::fill(panel.out, panel.out + panel.rows * width, 0.0f);
  for (int64_t group = 0; group < weight.groups; ++group) {
    const int64_t end = std::min((group + 1) * group_tiles, all_tiles);
    for (int64_t first_tile = group * group_tiles; first_tile < end; first_tile += kSegmentTiles) {
      const int tiles = static_cast<int>(std::min<int64_t>(kSegmentTiles, end - first_tile));
      for (int row = 0; row < panel.rows; row += kRows) {
        const int rows = std::min(kRows, panel.rows - row);
        ExpandedTile x[kRows][kSegmentTiles];
        float sums[kRows];
        for (int r = 0; r < rows; ++r) {
          sums[r] = Expand(panel.x[row + r] + first_tile * kTileK, panel.x_type, tiles, x[r]);
        }
        for (int unit = 0; unit < panel.units; ++unit) {
          float* out[kRows];
          for (int r = 0; r < rows; ++r) out[r] = panel.out + (row + r) * width + unit * kUnit;
          AddSegment<Type>(panel, panel.unit[unit], first_tile, tiles, group, rows, x, sums, out);
        }
      }
    }
  }
}

}  // namespace

void PortablePanel(const Panel& panel) {
  switch (panel.weight.code) {
    case Code::kInt4:
      return RunPanel<Int4>(panel);
    case Code::kInt8:
      return RunPanel<Int8>(panel);
    case Code::kE2M1:
      return RunPanel<E2M1>(panel);
    case Code::kBf16:
      return RunPanel<Whole<Element::kBf16>>(panel);
    case Code::kFp16:
      return RunPanel<Whole<Element::kF16>>(panel);
#define JMM_RUN(name, call_name, exponent_bits) \
  case Code::k##name:                           \
    return RunPanel<FloatByte<exponent_bits>>(panel);
      JMM_FLOAT_BYTES(JMM_RUN)
#undef JMM_RUN
  }
}

}  // namespace jax_marlin_moe::cpu
