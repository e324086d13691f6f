// The pointwise kernels for what every processor of the architecture has.

#include "pointwise.h"

#define RACECAR_NAMESPACE baseline
#define RACECAR_LEVEL baseline_level
#define RACECAR_NAME "baseline"
#if defined(__aarch64__)
#define RACECAR_FMA 1
#define RACECAR_VECTOR 16
#else
#define RACECAR_FMA 0
#define RACECAR_VECTOR 16
#endif

#include "pointwise.inl"
