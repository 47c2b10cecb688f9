// How a kernel asks for threads.
//
// A kernel knows no thread pool. It cuts its work into tasks, and `Parallel::run` calls the function once for each
// task, in any order, on any thread. The result of a task must not depend on that. In a session `run` is the pool
// of ONNX Runtime; in a test it is a loop (`sequential`) or some threads.
#pragma once

#include <cstddef>
#include <type_traits>

namespace headrace {

typedef void (*TaskFunction)(void* context, size_t task_idx);

struct Parallel {
  // Calls function(context, i) for i in 0..num_tasks-1 and returns when all are done. It may throw nothing.
  void (*run)(const void* pool, size_t num_tasks, TaskFunction function, void* context);
  const void* pool;
  // How many threads may work at once, at least 1. Use it to choose how many tasks to make, never how a sum is cut.
  int num_threads;

  // The same for a lambda: parallel.each(n, [&](size_t i) { ... }).
  template <typename Function>
  void each(size_t num_tasks, Function&& function) const {
    if (num_tasks == 0) return;
    if (num_tasks == 1) {
      function(size_t{0});
      return;
    }
    using Bare = typename std::remove_reference<Function>::type;
    run(pool, num_tasks, [](void* context, size_t task_idx) { (*static_cast<Bare*>(context))(task_idx); },
        const_cast<void*>(static_cast<const void*>(&function)));
  }
};

inline void run_in_turn(const void*, size_t num_tasks, TaskFunction function, void* context) {
  for (size_t task_idx = 0; task_idx < num_tasks; ++task_idx) function(context, task_idx);
}

// One thread: what a test passes, and what a kernel gets that is called through ctypes without a pool.
inline Parallel sequential() { return Parallel{run_in_turn, nullptr, 1}; }

// Threads for a caller that has no pool: tests and benchmarks through ctypes. They are started and joined in each run.
struct Threads {
  int num_threads;
  // Valid while this object lives.
  Parallel parallel() const;
};

}  // namespace headrace
