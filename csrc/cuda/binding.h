// What the files that include PyTorch add to the module of binding.cpp, and what they share: an error for a launch that
// failed, and the types of numbers.
#pragma once

#include "portable.cuh"

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

void bind_few_channels(pybind11::module_ &module);
void bind_fold(pybind11::module_ &module);
void bind_linear_chain(pybind11::module_ &module);

namespace racecar {
namespace cuda {

// After every launcher of kernels.h. A launch that was refused leaves its result as it was allocated: not to be used.
inline void check_launch(cudaError_t error, const char *kernel) {
  if (error != cudaSuccess)
    cudaGetLastError(); // an error of the launch, not of the device: the next launch must not find it again
  TORCH_CHECK(error == cudaSuccess, "the CUDA kernel ", kernel, " could not be launched: ", cudaGetErrorString(error),
              " (", cudaGetErrorName(error), ")");
}

inline void check_on_gpu(const at::Tensor &x, const char *name) {
  TORCH_CHECK_VALUE(x.is_cuda(), name, " must be on an NVIDIA GPU, it is on ", x.device());
}

inline Number number_of(at::ScalarType type, const char *name) {
  switch (type) {
  case at::kFloat:
    return Number::float32;
  case at::kBFloat16:
    return Number::bfloat16;
  case at::kHalf:
    return Number::float16;
  default:
    TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ", type);
  }
}

} // namespace cuda
} // namespace racecar
