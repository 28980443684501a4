// From packed words to A fragments of bytes, for products with rows of 8 bits (docs/kernels.md, "8-bit activations").
//
// A fragment is m64k32: two steps of 16 rows of K. Which byte stands for which row of K is the packed order's choice;
// the rows of x are permuted alike when they are quantised (quantize_rows.cuh).
#pragma once

#include "ptx/ptx.cuh"
#include "weights/codes.cuh"

namespace jmm {

// A byte of the fragment is kFactor times the code, as T's products read it. `first` and `second` are a lane's words of
// a sub-tile in two neighbouring steps. Output byte 16 h + 4 t + 2 s + i, or 16 s + 4 t + 2 i + h where codes have 8
// bits, has row 16 s + 8 h + 2 t + i: kBytePlace says where a row goes.
template <class Code, class T>
struct ByteFragments;

// The integer q < 16 read as e4m3 is q * 2^-9: one line of subnormal and first normal numbers.
template <class T>
struct ByteFragments<Int4, T> {
  static constexpr float kFactor = kSame<T, Fp8> ? power_of_two(-9) : 1.0f;

  __device__ __forceinline__ static void fragment(const uint32_t* first, const uint32_t* second, uint32_t (&a)[4]) {
    const uint32_t even = __byte_perm(first[0], second[0], 0x6420), odd = __byte_perm(first[0], second[0], 0x7531);
    a[0] = even & 0x0F0F0F0Fu, a[1] = odd & 0x0F0F0F0Fu;
    a[2] = even >> 4 & 0x0F0F0F0Fu, a[3] = odd >> 4 & 0x0F0F0F0Fu;
  }
};

// Eight bits are multiplied as they are.
struct WholeBytes {
  static constexpr float kFactor = 1.0f;

  __device__ __forceinline__ static void fragment(const uint32_t* first, const uint32_t* second, uint32_t (&a)[4]) {
    a[0] = first[0], a[1] = first[1], a[2] = second[0], a[3] = second[1];
  }
};
template <>
struct ByteFragments<E4M3, Fp8> : WholeBytes {};
template <>
struct ByteFragments<Int8, Signed8> : WholeBytes {};

}  // namespace jmm
