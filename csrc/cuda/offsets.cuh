// The types that offsets into arrays take. Extents are compile-time constants, so 64-bit arithmetic is paid for only
// where 32 bits do not reach.
#pragma once

#include "types.cuh"

namespace jmm {

template <bool kCondition, class A, class B>
struct Select {
  using Type = A;
};
template <class A, class B>
struct Select<false, A, B> {
  using Type = B;
};

// Of offsets into kExtent elements: all values in [0, kExtent).
template <int64_t kExtent>
using Offset = typename Select<(kExtent <= int64_t(1) << 32), uint32_t, uint64_t>::Type;

// The same, signed.
template <int64_t kExtent>
using Index = typename Select<(kExtent <= int64_t(1) << 31), int32_t, int64_t>::Type;

}  // namespace jmm
