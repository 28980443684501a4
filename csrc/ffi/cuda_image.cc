#include "ffi/cuda_image.h"

#include <cstring>

namespace jax_marlin_moe::cuda {
namespace {

constexpr size_t kHeaderBytes = 64, kSegmentBytes = 56, kSectionBytes = 64;
constexpr uint32_t kNoBits = 8;  // SHT_NOBITS: a section without bytes in the file

template <typename T>
T Read(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

bool Within(uint64_t offset, uint64_t length, uint64_t size) { return offset <= size && length <= size - offset; }

std::string ElfFault(const uint8_t* image, size_t size) {
  if (size < kHeaderBytes) return "its ELF header is cut off";
  if (image[4] != 2 || image[5] != 1) return "it is not a 64-bit little-endian ELF file";
  const uint64_t segments = Read<uint64_t>(image + 0x20), sections = Read<uint64_t>(image + 0x28);
  const uint64_t segment_bytes = Read<uint16_t>(image + 0x36), num_segments = Read<uint16_t>(image + 0x38);
  const uint64_t section_bytes = Read<uint16_t>(image + 0x3A), num_sections = Read<uint16_t>(image + 0x3C);
  if (num_sections == 0) return "its ELF file has no sections";
  if (section_bytes < kSectionBytes || (num_segments > 0 && segment_bytes < kSegmentBytes)) {
    return "its ELF headers are too short";
  }
  if (!Within(sections, num_sections * section_bytes, size) || !Within(segments, num_segments * segment_bytes, size)) {
    return "its ELF headers point past its " + std::to_string(size) + " bytes";
  }
  for (uint64_t i = 0; i < num_sections; ++i) {
    const uint8_t* section = image + sections + i * section_bytes;
    if (Read<uint32_t>(section + 4) == kNoBits) continue;
    if (!Within(Read<uint64_t>(section + 0x18), Read<uint64_t>(section + 0x20), size)) {
      return "section " + std::to_string(i) + " of its ELF file ends past its " + std::to_string(size) + " bytes";
    }
  }
  for (uint64_t i = 0; i < num_segments; ++i) {
    const uint8_t* segment = image + segments + i * segment_bytes;
    if (!Within(Read<uint64_t>(segment + 8), Read<uint64_t>(segment + 0x20), size)) {
      return "segment " + std::to_string(i) + " of its ELF file ends past its " + std::to_string(size) + " bytes";
    }
  }
  return "";
}

// The driver's compiler reads text up to its first NUL, so nothing but the last byte may be one.
std::string PtxFault(const uint8_t* image, size_t size) {
  const void* end = std::memchr(image, 0, size);
  if (end == nullptr) return "its PTX text does not end with NUL";
  if (end != image + size - 1) return "its PTX text goes on behind a NUL";
  return "";
}

bool IsTextByte(uint8_t byte) { return (byte >= ' ' && byte <= '~') || byte == '\n' || byte == '\r' || byte == '\t'; }

}  // namespace

std::string ImageFault(const uint8_t* image, size_t size) {
  if (size >= 4 && std::memcmp(image,
                               "\x7f"
                               "ELF",
                               4) == 0)
    return ElfFault(image, size);
  if (size >= 2 && IsTextByte(image[0]) && IsTextByte(image[1])) return PtxFault(image, size);
  return "it is neither an ELF file nor PTX text";
}

}  // namespace jax_marlin_moe::cuda
