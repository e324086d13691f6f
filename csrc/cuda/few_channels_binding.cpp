// Kernels between few and many channels for PyTorch. What is served and how a launch is cut into blocks stands in
// racecar_kernels/cuda, which hands over the parameters as they lie in memory; this file checks no more than their
// size.

#include "binding.h"
#include "kernels.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <string>

namespace {

using racecar::cuda::FewParams;

// like: a tensor of the images' type and device.
void few_channels(int kernel, int few, const pybind11::bytes &bytes, const at::Tensor &like) {
  racecar::cuda::check_on_gpu(like, "like");
  TORCH_CHECK_VALUE(kernel >= 0 && kernel < 3, "kernel must be 0 (narrow), 1 (wide) or 2 (weight), got ", kernel);
  TORCH_CHECK_VALUE(few >= 1 && few <= 4, "1 to 4 channels are served, got ", few);
  const std::string memory = bytes;
  TORCH_CHECK_VALUE(memory.size() == sizeof(FewParams), "the parameters have ", memory.size(), " bytes, this module's ",
                    sizeof(FewParams), ": it was built from another version of the package");
  FewParams params;
  std::memcpy(&params, memory.data(), sizeof(params));
  const auto number = racecar::cuda::number_of(like.scalar_type(), "like");
  const c10::cuda::CUDAGuard guard(like.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  auto *const launcher = kernel == 0   ? &racecar::cuda::few_channels_narrow
                         : kernel == 1 ? &racecar::cuda::few_channels_wide
                                       : &racecar::cuda::few_channels_weight;
  racecar::cuda::check_launch(launcher(params, number, few, stream), "few_channels");
}

} // namespace

void bind_few_channels(pybind11::module_ &module) {
  module.def("few_channels", &few_channels, pybind11::arg("kernel"), pybind11::arg("few"), pybind11::arg("params"),
             pybind11::arg("like"), "Launches a kernel between few and many channels; see racecar_kernels/cuda.");
}
