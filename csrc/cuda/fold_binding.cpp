// Folded weights for PyTorch: checks, allocates, launches on the current stream. The equations stand in fold.cuh.

#include "binding.h"
#include "kernels.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>

namespace {

using at::Tensor;
using racecar::cuda::FoldParams;
using Factor = std::array<int64_t, 2>; // rows, columns

// grow: 1 for the folded weight, which has factor - 1 taps more, -1 for its adjoint.
FoldParams params_of(const Tensor &from, const Factor &factor, int grow, const char *name) {
  racecar::cuda::check_on_gpu(from, name);
  TORCH_CHECK_VALUE(from.dim() == 4, name, " must have 4 dimensions (outputs, inputs, rows, columns), got shape ",
                    from.sizes());
  TORCH_CHECK_VALUE(factor[0] >= 1 && factor[1] >= 1, "factor must be at least 1 in both directions, got (", factor[0],
                    ", ", factor[1], ")");
  FoldParams params{};
  int64_t numbers = 1;
  for (int i = 0; i < 4; ++i) {
    const int64_t size = i < 2 ? from.size(i) : from.size(i) + grow * (factor[i - 2] - 1);
    TORCH_CHECK_VALUE(i < 2 || (from.size(i) >= 1 && size >= 1), name, " has ", from.size(i),
                      i == 2 ? " rows" : " columns", ", too few for a factor of ", i < 2 ? 1 : factor[i - 2]);
    TORCH_CHECK_VALUE(size <= INT32_MAX && (numbers == 0 || size <= INT32_MAX / numbers),
                      "the result would have 2^31 numbers or more");
    numbers *= size;
    params.size[i] = static_cast<uint32_t>(size);
    params.from_stride[i] = from.stride(i);
  }
  for (int i = 0; i < 2; ++i) {
    params.from_size[i] = static_cast<int32_t>(from.size(2 + i));
    params.factor[i] = static_cast<int32_t>(factor[i]);
  }
  params.from = from.const_data_ptr();
  return params;
}

// An empty tensor of the result's size, in the memory format of what it is made from.
Tensor result_of(FoldParams &params, const Tensor &from, at::ScalarType type) {
  const std::array<int64_t, 4> size{params.size[0], params.size[1], params.size[2], params.size[3]};
  Tensor to = at::empty(size, from.options().dtype(type).memory_format(from.suggest_memory_format()));
  std::copy_n(to.strides().begin(), 4, params.to_stride);
  params.to = to.mutable_data_ptr();
  return to;
}

Tensor fold(const Tensor &weight, const Factor &factor) {
  FoldParams params = params_of(weight, factor, 1, "weight");
  const auto number = racecar::cuda::number_of(weight.scalar_type(), "weight");
  const c10::cuda::CUDAGuard guard(weight.device());
  Tensor folded = result_of(params, weight, weight.scalar_type());
  racecar::cuda::check_launch(racecar::cuda::fold(params, number, c10::cuda::getCurrentCUDAStream()), "fold");
  return folded;
}

Tensor fold_adjoint(const Tensor &grad, const Factor &factor, at::ScalarType type) {
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat, "grad must be float32, got ", grad.scalar_type());
  FoldParams params = params_of(grad, factor, -1, "grad");
  const auto number = racecar::cuda::number_of(type, "dtype");
  const c10::cuda::CUDAGuard guard(grad.device());
  Tensor unfolded = result_of(params, grad, type);
  racecar::cuda::check_launch(racecar::cuda::fold_adjoint(params, number, c10::cuda::getCurrentCUDAStream()),
                              "fold_adjoint");
  return unfolded;
}

} // namespace

void bind_fold(pybind11::module_ &module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  module.def("fold", &fold, pybind11::arg("weight"), pybind11::arg("factor"), no_gil,
             "W_f[t] = sum of W[t - i], i < factor, in both directions: (O, I, H, W) to (O, I, H + f - 1, W + f - 1).");
  module.def("fold_adjoint", &fold_adjoint, pybind11::arg("grad"), pybind11::arg("factor"), pybind11::arg("dtype"),
             no_gil, "From the float32 gradient of the folded weight to that of the weight, in dtype.");
}
