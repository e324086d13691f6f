#include "linear_chain_backward.cuh"
#include "linear_chain_forward.cuh"
#include "linear_chain_sums.cuh"

#include "kernels.h"

namespace racecar {
namespace cuda {

cudaError_t linear_chain_forward(const ChainParams &params, Number number, cudaStream_t stream) {
  return with_number(number, [&](auto of) {
    const cudaError_t error = launch<ChainForward<decltype(of)>>(params, stream);
    return error != cudaSuccess ? error : launch<ChainSums<decltype(of), false>>(params, stream);
  });
}

cudaError_t linear_chain_backward(const ChainParams &params, Number number, cudaStream_t stream) {
  return with_number(number, [&](auto of) {
    const cudaError_t error = launch<ChainBackward<decltype(of)>>(params, stream);
    return error != cudaSuccess ? error : launch<ChainSums<decltype(of), true>>(params, stream);
  });
}

} // namespace cuda
} // namespace racecar
