// The pointwise kernels for x86-64 with AVX-512 (F, BW, VL, DQ). Called only where the processor has it.

#include "pointwise.h"

#if defined(RACECAR_X86_LEVELS)
#define RACECAR_AVX 512
#define RACECAR_NAMESPACE avx512
#define RACECAR_LEVEL avx512_level
#define RACECAR_KERNELS "pointwise.inl"
#include "level.inl"
#endif
