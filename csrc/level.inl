// Compiles the kernels of the file RACECAR_KERNELS for one level of SIMD instructions. RACECAR_AVX is 512 (with F, BW,
// VL and DQ), 2 (with FMA), or 0 for what every processor of the architecture has. The kernels are given the level's
// RACECAR_NAME; RACECAR_FMA, whether there is a fused multiply-add; RACECAR_VECTOR, how many bytes a register holds.

#if RACECAR_AVX == 512
#define RACECAR_NAME "avx512"
#define RACECAR_FMA 1
#define RACECAR_VECTOR 64
#define RACECAR_TARGET "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#elif RACECAR_AVX == 2
#define RACECAR_NAME "avx2"
#define RACECAR_FMA 1
#define RACECAR_VECTOR 32
#define RACECAR_TARGET "avx2,fma"
#else
#define RACECAR_NAME "baseline"
#if defined(__aarch64__)
#define RACECAR_FMA 1
#else
#define RACECAR_FMA 0
#endif
#define RACECAR_VECTOR 16
#endif

#if defined(RACECAR_TARGET)
#include <immintrin.h> // in front of the pragma, which it is not written for

#define RACECAR_TEXT(...) #__VA_ARGS__
#define RACECAR_PRAGMA(...) _Pragma(RACECAR_TEXT(__VA_ARGS__))
#if defined(__clang__)
RACECAR_PRAGMA(clang attribute push(__attribute__((target(RACECAR_TARGET))), apply_to = function))
#else
RACECAR_PRAGMA(GCC push_options)
RACECAR_PRAGMA(GCC target(RACECAR_TARGET))
#endif
#endif

#include RACECAR_KERNELS

#if defined(RACECAR_TARGET)
#if defined(__clang__)
RACECAR_PRAGMA(clang attribute pop)
#else
RACECAR_PRAGMA(GCC pop_options)
#endif
#endif
