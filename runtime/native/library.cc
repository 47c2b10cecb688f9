// What the library has beside its operators: the choice of the variant, and threads for callers without a pool.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "parallel.h"
#include "variant.h"

namespace headrace {
namespace {

constexpr int NUM_VARIANTS = 3;
const char* const NAMES[NUM_VARIANTS] = {"generic", "avx2", "avx512vnni"};

bool can_run(int variant) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (variant == static_cast<int>(Variant::avx2)) return has_avx2;
  if (variant == static_cast<int>(Variant::avx512vnni)) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  }
#endif
  return variant == 0;
}

int variant_named(const char* name) {
  for (int variant = 0; variant < NUM_VARIANTS; ++variant) {
    if (std::strcmp(name, NAMES[variant]) == 0 && can_run(variant)) return variant;
  }
  return -1;
}

// An unknown name in the environment is refused by runtime/native/library.py before anything is loaded.
int first_choice() {
  const char* asked = std::getenv("HEADRACE_NATIVE_ISA");
  if (asked != nullptr && variant_named(asked) >= 0) return variant_named(asked);
  int best = NUM_VARIANTS - 1;
  while (!can_run(best)) --best;
  return best;
}

std::atomic<int>& chosen() {
  static std::atomic<int> variant{first_choice()};
  return variant;
}

struct Cursor {
  std::atomic<size_t> next{0};
  size_t num_tasks;
  TaskFunction function;
  void* context;

  void work() {
    for (size_t idx = next++; idx < num_tasks; idx = next++) function(context, idx);
  }
};

void run_on_threads(const void* pool, size_t num_tasks, TaskFunction function, void* context) {
  Cursor cursor;
  cursor.num_tasks = num_tasks;
  cursor.function = function;
  cursor.context = context;
  std::vector<std::thread> others;
  for (int idx = 1; idx < static_cast<const Threads*>(pool)->num_threads; ++idx) {
    others.emplace_back([&cursor] { cursor.work(); });
  }
  cursor.work();
  for (std::thread& other : others) other.join();
}

}  // namespace

Variant chosen_variant() { return static_cast<Variant>(chosen().load(std::memory_order_relaxed)); }

Parallel Threads::parallel() const {
  return num_threads <= 1 ? sequential() : Parallel{run_on_threads, this, num_threads};
}

}  // namespace headrace

// Choose the variant of the kernels that are called, and of the operators of sessions that are made, from now on.
// Returns whether this processor runs it.
HEADRACE_EXPORT int headrace_use_variant(const char* name) {
  const int variant = headrace::variant_named(name);
  if (variant >= 0) headrace::chosen().store(variant);
  return variant >= 0;
}

HEADRACE_EXPORT const char* headrace_variant() { return headrace::NAMES[headrace::chosen().load()]; }
