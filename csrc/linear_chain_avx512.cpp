// The kernels of a chain of linear layers for x86-64 with AVX-512 (F, BW, VL, DQ). Called only where the processor has
// it.

#include "linear_chain.h"

#if defined(RACECAR_X86_LEVELS)
#define RACECAR_AVX 512
#define RACECAR_NAMESPACE chain_avx512
#define RACECAR_CHAIN_LEVEL avx512_chain_level
#define RACECAR_KERNELS "linear_chain.inl"
#include "level.inl"
#endif
