// The pointwise kernels for x86-64 with AVX-512 (F, BW, VL, DQ). Called only where the processor has it.

#include "pointwise.h"

#if defined(RACECAR_X86_LEVELS)

#define RACECAR_NAMESPACE avx512
#define RACECAR_LEVEL avx512_level
#define RACECAR_NAME "avx512"
#define RACECAR_FMA 1
#define RACECAR_VECTOR 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))),                   \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#include "pointwise.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
