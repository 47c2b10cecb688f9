// Entry points for callers without a session: tests and benchmarks call the chosen variant's kernels through ctypes.
#include "norm.h"
#include "threads.h"

using namespace headrace;

HEADRACE_EXPORT void headrace_add_norm(const AddNorm* job, int num_threads) {
  const Threads threads{num_threads};
  norm_kernels().add_norm(*job, threads.parallel());
}

HEADRACE_EXPORT void headrace_gate_up(const GateUp* job, int num_threads) {
  const Threads threads{num_threads};
  norm_kernels().gate_up(*job, threads.parallel());
}
