// Threads for a caller that has no pool: tests and benchmarks through ctypes. They are started and joined in each run.
#pragma once

#include "parallel.h"

namespace headrace {

struct Threads {
  int num_threads;
  // Valid while this object lives.
  Parallel parallel() const;
};

}  // namespace headrace
