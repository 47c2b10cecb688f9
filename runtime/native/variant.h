// Which instruction set runs: one table of functions for each variant of a kernel source, chosen when it is asked for.
//
// A kernel's header declares a struct of function pointers and says HEADRACE_TABLE(NormKernels, norm_kernels). Its
// source, compiled once for each variant, defines `const NormKernels norm_kernels` in namespace HEADRACE_VARIANT.
// headrace::norm_kernels() is then the table of the chosen variant. Who packs weights keeps the table that packed them.
#pragma once

namespace headrace {

enum class Variant { generic, avx2, avx512vnni };

// The best that the processor runs, or what HEADRACE_NATIVE_ISA or headrace_use_variant says.
Variant chosen_variant();

}  // namespace headrace

#if defined(__x86_64__)
#define HEADRACE_TABLE(Table, name)               \
  namespace generic { extern const Table name; }    \
  namespace avx2 { extern const Table name; }       \
  namespace avx512vnni { extern const Table name; } \
  static inline const Table& name() {               \
    switch (chosen_variant()) {                     \
      case Variant::avx512vnni: return avx512vnni::name; \
      case Variant::avx2: return avx2::name;        \
      default: return generic::name;                \
    }                                               \
  }
#else
#define HEADRACE_TABLE(Table, name)            \
  namespace generic { extern const Table name; } \
  static inline const Table& name() { return generic::name; }
#endif

#define HEADRACE_EXPORT extern "C" __attribute__((visibility("default")))
