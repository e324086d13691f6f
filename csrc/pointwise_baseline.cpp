// The pointwise kernels for what every processor of the architecture has.

#include "pointwise.h"

#define RACECAR_AVX 0
#define RACECAR_NAMESPACE baseline
#define RACECAR_LEVEL baseline_level
#define RACECAR_KERNELS "pointwise.inl"
#include "level.inl"
