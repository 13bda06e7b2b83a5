// Compiles the file POISONSHIELD_KERNELS once for each level of the processor, each into a namespace of its own, and
// `best_level()` tells at run time which to call. No level fuses a product with a sum (-ffp-contract=off), so that all
// give the same bits. What the kernels include must be included before, outside of the namespaces.
#pragma once

namespace poisonshield {
namespace plain {
#include POISONSHIELD_KERNELS
}  // namespace plain
}  // namespace poisonshield

#if defined(__x86_64__)
#define POISONSHIELD_HAS_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace poisonshield {
namespace avx2 {
#include POISONSHIELD_KERNELS
}  // namespace avx2
}  // namespace poisonshield
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace poisonshield {

// function of the best level that this processor has, such as POISONSHIELD_BEST(forward).
#if defined(POISONSHIELD_HAS_AVX2)
#define POISONSHIELD_BEST(function) (__builtin_cpu_supports("avx2") ? avx2::function : plain::function)
#else
#define POISONSHIELD_BEST(function) plain::function
#endif

}  // namespace poisonshield
