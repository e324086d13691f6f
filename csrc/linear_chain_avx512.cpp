// The kernels of a chain of linear layers for x86-64 with AVX-512 (F, BW, VL, DQ). Called only where the processor has
// it.

#include "linear_chain.h"

#if defined(RACECAR_X86_LEVELS)

#include <immintrin.h>

#define RACECAR_NAMESPACE chain_avx512
#define RACECAR_CHAIN_LEVEL avx512_chain_level
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

#include "linear_chain.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
