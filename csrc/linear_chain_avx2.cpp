// The kernels of a chain of linear layers for x86-64 with AVX2 and FMA. Called only where the processor has it.

#include "linear_chain.h"

#if defined(RACECAR_X86_LEVELS)
#define RACECAR_AVX 2
#define RACECAR_NAMESPACE chain_avx2
#define RACECAR_CHAIN_LEVEL avx2_chain_level
#define RACECAR_KERNELS "linear_chain.inl"
#include "level.inl"
#endif
