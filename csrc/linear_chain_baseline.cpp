// The kernels of a chain of linear layers for what every processor of the architecture has.

#include "linear_chain.h"

#define RACECAR_AVX 0
#define RACECAR_NAMESPACE chain_baseline
#define RACECAR_CHAIN_LEVEL baseline_chain_level
#define RACECAR_KERNELS "linear_chain.inl"
#include "level.inl"
