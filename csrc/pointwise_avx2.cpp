// The pointwise kernels for x86-64 with AVX2 and FMA. Called only where the processor has it.

#include "pointwise.h"

#if defined(RACECAR_X86_LEVELS)

#define RACECAR_NAMESPACE avx2
#define RACECAR_LEVEL avx2_level
#define RACECAR_NAME "avx2"
#define RACECAR_FMA 1
#define RACECAR_VECTOR 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "pointwise.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
