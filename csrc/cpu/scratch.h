// Memory that a call works in.
#ifndef JAX_MARLIN_MOE_CPU_SCRATCH_H_
#define JAX_MARLIN_MOE_CPU_SCRATCH_H_

#include <cstddef>
#include <new>
#include <utility>
#include <vector>

namespace jax_marlin_moe::cpu {

// An allocation that failed, with its size: std::bad_alloc does not say it.
class ScratchExhausted : public std::bad_alloc {
 public:
  explicit ScratchExhausted(size_t bytes) : bytes_(bytes) {}
  const char* what() const noexcept override { return "an allocation of scratch memory failed"; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
};

template <class Type>
struct ScratchAllocator {
  using value_type = Type;

  ScratchAllocator() = default;
  template <class Other>
  ScratchAllocator(const ScratchAllocator<Other>&) {}

  Type* allocate(size_t count) {
    void* memory = ::operator new(count * sizeof(Type), std::nothrow);
    if (memory == nullptr) throw ScratchExhausted(count * sizeof(Type));
    return static_cast<Type*>(memory);
  }
  void deallocate(Type* memory, size_t) { ::operator delete(memory); }

  // Elements that are given no value stay uninitialised: clearing what is written anyway costs a pass over memory.
  template <class Element>
  void construct(Element* element) {
    ::new (static_cast<void*>(element)) Element;
  }
  template <class Element, class... Values>
  void construct(Element* element, Values&&... values) {
    ::new (static_cast<void*>(element)) Element(std::forward<Values>(values)...);
  }

  friend bool operator==(const ScratchAllocator&, const ScratchAllocator&) { return true; }
  friend bool operator!=(const ScratchAllocator&, const ScratchAllocator&) { return false; }
};

// A vector whose failed allocations throw ScratchExhausted. Scratch<float>(n) is uninitialised.
template <class Type>
using Scratch = std::vector<Type, ScratchAllocator<Type>>;

}  // namespace jax_marlin_moe::cpu

#endif  // JAX_MARLIN_MOE_CPU_SCRATCH_H_
