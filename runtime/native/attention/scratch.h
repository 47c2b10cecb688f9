// Memory of a thread that is kept from call to call. No standard container: its code would be shared between variants.
#pragma once

#include <cstddef>
#include <cstdlib>

#include "../vec.h"

namespace headrace {
namespace HEADRACE_VARIANT {

// Grows, never shrinks. What it held is lost when it grows.
struct Scratch {
  char* memory = nullptr;
  size_t size = 0;
  size_t used = 0;

  ~Scratch() { std::free(memory); }

  static size_t rounded(size_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

  // Start over with room for so many bytes, each part rounded up to 64. False if there is no memory.
  bool reset(size_t num_bytes) {
    used = 0;
    if (num_bytes <= size) return true;
    std::free(memory);
    size = rounded(num_bytes + num_bytes / 2);
    memory = static_cast<char*>(std::aligned_alloc(64, size));
    if (!memory) size = 0;
    return memory != nullptr;
  }

  template <typename T>
  T* take(size_t count) {
    T* part = reinterpret_cast<T*>(memory + used);
    used += rounded(count * sizeof(T));
    return part;
  }
};

}  // namespace HEADRACE_VARIANT
}  // namespace headrace
