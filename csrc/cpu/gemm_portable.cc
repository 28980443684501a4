// The panel kernel in standard C++, for processors without one of their own, and the plainest statement of
// what the others compute. Its inner loops run over the 16 words of a packed line, which compilers vectorise.
#include <algorithm>

#include "cpu/element.h"
#include "cpu/gemm.h"

namespace jax_marlin_moe::cpu {
namespace {

constexpr int kLine = 16;          // words of one column class: [t = 0..3][w = 0..3]
constexpr int kRows = 4;           // rows that share one dequantisation
constexpr int kSegmentTiles = 16;  // most tiles between two applications of the scale
// A word's codes for columns of half b: k = 2t, 2t + 1, 2t + 8, 2t + 9 of the tile at these shifts + 8 * b.
constexpr int kShift[4] = {0, 16, 4, 20};
constexpr int kOffset[4] = {0, 1, 8, 9};

// x of a tile as the words of a line meet it: lane 4 * t + w of vector j holds x[2 * t + kOffset[j]].
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

// Adds scale * (q - zero) . x over `tiles` tiles of one chunk to `out`.
void AddSegment(const Panel& panel, int64_t chunk, int64_t first_tile, int tiles, int64_t group, int rows,
                const ExpandedTile (*x)[kSegmentTiles], const float* sums, float* const* out) {
  const ExpertMatrix& weight = panel.weight;
  const uint16_t* scales = weight.scales + group * weight.n + chunk * kChunk;
  const int32_t* zeros = weight.zeros ? weight.zeros + (group * weight.n + chunk * kChunk) / 8 : nullptr;
  for (int col = 0; col < 8; ++col) {
    float acc[kRows][2][kLine] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      const int32_t* line = weight.packed + (first_tile + tile) * weight.n * 2 + chunk * kTileWords + col * kLine;
      for (int b = 0; b < 2; ++b) {
        for (int j = 0; j < 4; ++j) {
          float codes[kLine];
          for (int lane = 0; lane < kLine; ++lane) {
            const uint32_t word = static_cast<uint32_t>(line[lane]);
            codes[lane] = static_cast<float>(static_cast<int32_t>((word >> (kShift[j] + 8 * b)) & 15) - 8);
          }
          for (int r = 0; r < rows; ++r) {
            for (int lane = 0; lane < kLine; ++lane) acc[r][b][lane] += codes[lane] * x[r][tile].x[j][lane];
          }
        }
      }
    }
    for (int w = 0; w < 4; ++w) {
      for (int b = 0; b < 2; ++b) {
        const float scale = FloatFromElement(scales[8 * col + 2 * w + b], weight.scale_type);
        int excess = 0;  // of the zero point over the 8 that the codes already have subtracted
        if (zeros) excess = static_cast<int>((static_cast<uint32_t>(zeros[col]) >> (4 * w + 16 * b)) & 15) - 8;
        for (int r = 0; r < rows; ++r) {
          float dot = (acc[r][b][w] + acc[r][b][8 + w]) + (acc[r][b][4 + w] + acc[r][b][12 + w]);
          if (zeros) dot -= static_cast<float>(excess) * sums[r];
          out[r][16 * w + 8 * b + col] += scale * dot;
        }
      }
    }
  }
}

}  // namespace

void PortablePanel(const Panel& panel) {
  const ExpertMatrix& weight = panel.weight;
  const int64_t width = static_cast<int64_t>(panel.chunks) * kChunk;
  const int64_t group_tiles = weight.k / weight.groups / kTileK;
  std::fill(panel.out, panel.out + panel.rows * width, 0.0f);
  for (int64_t group = 0; group < weight.groups; ++group) {
    for (int64_t done = 0; done < group_tiles; done += kSegmentTiles) {
      const int64_t first_tile = group * group_tiles + done;
      const int tiles = static_cast<int>(std::min<int64_t>(kSegmentTiles, group_tiles - done));
      for (int row = 0; row < panel.rows; row += kRows) {
        const int rows = std::min(kRows, panel.rows - row);
        ExpandedTile x[kRows][kSegmentTiles];
        float sums[kRows];
        for (int r = 0; r < rows; ++r) {
          sums[r] = Expand(panel.x[row + r] + first_tile * kTileK, panel.x_type, tiles, x[r]);
        }
        for (int chunk = 0; chunk < panel.chunks; ++chunk) {
          float* out[kRows];
          for (int r = 0; r < rows; ++r) out[r] = panel.out + (row + r) * width + chunk * kChunk;
          AddSegment(panel, panel.chunk[chunk], first_tile, tiles, group, rows, x, sums, out);
        }
      }
    }
  }
}

}  // namespace jax_marlin_moe::cpu
