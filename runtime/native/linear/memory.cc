// See memory.h.
#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace headrace {
namespace {

constexpr size_t LARGE_PAGE = 2 << 20, REGION = 32 << 20;

// The region that matrices are cut from now. Each matrix keeps its region alive.
struct Current {
  std::mutex mutex;
  std::weak_ptr<uint8_t> region;
  size_t used = 0, size = 0;
};

WeightMemory new_region(size_t size) {
  void* memory = std::aligned_alloc(LARGE_PAGE, size);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(memory, size, MADV_HUGEPAGE);  // a wish: it may be refused
#endif
  return WeightMemory(static_cast<uint8_t*>(memory), std::free);
}

}  // namespace

WeightMemory allocate_weights(size_t size) {
  static Current current;
  const std::lock_guard<std::mutex> lock(current.mutex);
  size = (size + 63) / 64 * 64;
  WeightMemory region = current.region.lock();
  if (region == nullptr || current.size - current.used < size) {
    current.size = size > REGION ? (size + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE : REGION;
    region = new_region(current.size);
    current.region = region;
    current.used = 0;
  }
  uint8_t* start = region.get() + current.used;
  current.used += size;
  return WeightMemory(region, start);
}

}  // namespace headrace
