// The kernels of a chain of linear layers for what every processor of the architecture has.

#include "linear_chain.h"

#define RACECAR_NAMESPACE chain_baseline
#define RACECAR_CHAIN_LEVEL baseline_chain_level
#define RACECAR_NAME "baseline"
#if defined(__aarch64__)
#define RACECAR_FMA 1
#else
#define RACECAR_FMA 0
#endif
#if defined(__GNUC__) || defined(__clang__)
#define RACECAR_VECTOR 16
#endif

#include "linear_chain.inl"
