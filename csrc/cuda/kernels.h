// The launchers of csrc/cuda/*.cu: plain data in, an error out, nothing of PyTorch. Each launches on the given stream
// of the current device and waits for nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "few_channels.h"
#include "fold.cuh"
#include "linear_chain.h"

namespace racecar {
namespace cuda {

cudaError_t fold(const FoldParams &params, Number number, cudaStream_t stream);
// From float32 sums to the weight's own type.
cudaError_t fold_adjoint(const FoldParams &params, Number number, cudaStream_t stream);

// Between an image of `few` channels (1 to 4) and one of many: a result of few channels, one of many, and the sums of
// the weight's gradient.
cudaError_t few_channels_narrow(const FewParams &params, Number number, int few, cudaStream_t stream);
cudaError_t few_channels_wide(const FewParams &params, Number number, int few, cudaStream_t stream);
cudaError_t few_channels_weight(const FewParams &params, Number number, int few, cudaStream_t stream);

// A chain of narrow linear layers, cut() before; each adds up its blocks' sums in a second launch.
cudaError_t linear_chain_forward(const ChainParams &params, Number number, cudaStream_t stream);
cudaError_t linear_chain_backward(const ChainParams &params, Number number, cudaStream_t stream);

} // namespace cuda
} // namespace racecar
