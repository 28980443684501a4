// From packed words to A fragments of bytes, for products with rows of 8 bits (docs/kernels.md, "8-bit activations").
//
// A fragment is m64k32: two steps of 16 rows of K. Which byte stands for which row of K is the packed order's choice;
// the rows of x are permuted alike when they are quantised (quantize_rows.cuh).
#pragma once

#include "ptx/numbers.cuh"
#include "weights/codes.cuh"

namespace jmm {

// A byte of the fragment is kFactor times what the code has above kOffset, as T's products read it. `first` and
// `second` are a lane's words of a sub-tile in two neighbouring steps. Output byte 16 h + 4 t + 2 s + i, or 16 s + 4 t
// + 2 i + h where codes have 8 bits, has row 16 s + 8 h + 2 t + i: quantize_rows.cuh permutes the rows of x alike.
template <class Code, class T>
struct ByteFragments;

// The integer q < 16 read as e4m3 is q * 2^-9: one line of subnormal and first normal numbers.
template <>
struct ByteFragments<Int4, Fp8> {
  using Product = Fp8;
  static constexpr bool kFolds = false;
  static constexpr float kFactor = power_of_two(-9), kOffset = 0.0f;

  __device__ __forceinline__ static void fragment(const uint32_t* first, const uint32_t* second, uint32_t (&a)[4]) {
    const uint32_t even = __byte_perm(first[0], second[0], 0x6420), odd = __byte_perm(first[0], second[0], 0x7531);
    a[0] = even & 0x0F0F0F0Fu, a[1] = odd & 0x0F0F0F0Fu;
    a[2] = even >> 4 & 0x0F0F0F0Fu, a[3] = odd >> 4 & 0x0F0F0F0Fu;
  }
};

// In the upper half of a byte, with its first bit the other way round, q is 16 (q - 8).
template <>
struct ByteFragments<Int4, Signed8> {
  using Product = Signed8;
  static constexpr bool kFolds = false;
  static constexpr float kFactor = 16.0f, kOffset = 8.0f;

  __device__ __forceinline__ static void fragment(const uint32_t* first, const uint32_t* second, uint32_t (&a)[4]) {
    const uint32_t even = __byte_perm(first[0], second[0], 0x6420), odd = __byte_perm(first[0], second[0], 0x7531);
    a[0] = (even << 4 & 0xF0F0F0F0u) ^ 0x80808080u, a[1] = (odd << 4 & 0xF0F0F0F0u) ^ 0x80808080u;
    a[2] = (even & 0xF0F0F0F0u) ^ 0x80808080u, a[3] = (odd & 0xF0F0F0F0u) ^ 0x80808080u;
  }
};

// e2m1 takes in the power of two by which a group's scale is less than the largest of the column's: as numbers of e5m2,
// whose products with e4m3 have an instruction, from a table of eight bytes. `exponents` says of the fragment's even
// and odd columns, 16 bits each, which exponent 0.5 gets there: kMost with the largest scale, and at least 1.
template <>
struct ByteFragments<E2M1, Fp8> {
  using Product = E5M2TimesFp8;
  static constexpr bool kFolds = true;
  static constexpr int kMost = 27, kRange = kMost - 1;  // 6 has the largest exponent then
  static constexpr float kFactor = power_of_two(kMost - 15 + 1), kOffset = 0.0f;

  __device__ __forceinline__ static void fragment(const uint32_t* first, const uint32_t* second, uint32_t (&a)[4],
                                                  uint32_t exponents) {
    const uint32_t even = __byte_perm(first[0], second[0], 0x6420), odd = __byte_perm(first[0], second[0], 0x7531);
    column(a[0], a[2], even, exponents & 0xFFFFu);
    column(a[1], a[3], odd, exponents >> 16);
  }

 private:
  // Eight codes of a column: bytes of the first step, and of the second.
  __device__ __forceinline__ static void column(uint32_t& first, uint32_t& second, uint32_t codes, uint32_t exponent) {
    const uint32_t low = exponent * 0x04040400u + 0x06040000u;   // 1.5, 1, 0.5, 0
    const uint32_t high = exponent * 0x04040404u + 0x0E0C0A08u;  // 6, 4, 3, 2
    const uint32_t magnitudes = codes & 0x77777777u, signs = codes << 4;
    first = chosen_bytes(low, high, magnitudes) | (__byte_perm(codes, signs, 0x1504) & 0x80808080u);
    second = chosen_bytes(low, high, magnitudes >> 16) | (__byte_perm(codes, signs, 0x3726) & 0x80808080u);
  }
};

template <>
struct ByteFragments<E4M3, Fp8> {
  using Product = Fp8;
  static constexpr bool kFolds = false;
  static constexpr float kFactor = 1.0f, kOffset = 0.0f;

  __device__ __forceinline__ static void fragment(const uint32_t* first, const uint32_t* second, uint32_t (&a)[4]) {
    a[0] = first[0], a[1] = first[1], a[2] = second[0], a[3] = second[1];
  }
};

template <>
struct ByteFragments<Int8, Signed8> {
  using Product = Signed8;
  static constexpr bool kFolds = false;
  static constexpr float kFactor = 1.0f, kOffset = 128.0f;

  __device__ __forceinline__ static void fragment(const uint32_t* first, const uint32_t* second, uint32_t (&a)[4]) {
    a[0] = first[0] ^ 0x80808080u, a[1] = first[1] ^ 0x80808080u;
    a[2] = second[0] ^ 0x80808080u, a[3] = second[1] ^ 0x80808080u;
  }
};

}  // namespace jmm
