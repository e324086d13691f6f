// The pointwise kernels for x86-64 with AVX2 and FMA. Called only where the processor has it.

#include "pointwise.h"

#if defined(RACECAR_X86_LEVELS)
#define RACECAR_AVX 2
#define RACECAR_NAMESPACE avx2
#define RACECAR_LEVEL avx2_level
#define RACECAR_KERNELS "pointwise.inl"
#include "level.inl"
#endif
