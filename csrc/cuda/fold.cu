#include "kernels.h"

namespace racecar {
namespace cuda {

cudaError_t fold(const FoldParams &params, Number number, cudaStream_t stream) {
  return with_number(number, [&](auto of) { return launch<Fold<decltype(of), decltype(of), false>>(params, stream); });
}

cudaError_t fold_adjoint(const FoldParams &params, Number number, cudaStream_t stream) {
  return with_number(number, [&](auto of) { return launch<Fold<float, decltype(of), true>>(params, stream); });
}

} // namespace cuda
} // namespace racecar
