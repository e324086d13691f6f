#include "few_channels_wide.cuh"
#include "kernels.h"

#include <type_traits>

namespace racecar {
namespace cuda {

cudaError_t few_channels_wide(const FewParams &params, Number number, int few, cudaStream_t stream) {
  return with_few<Wide>(number, few,
                        [&](auto *of) { return launch<std::remove_pointer_t<decltype(of)>>(params, stream); });
}

} // namespace cuda
} // namespace racecar
