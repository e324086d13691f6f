// A chain of narrow linear layers for PyTorch: checks, allocates, and launches on the current stream. The interface is
// that of ../linear_chain_binding.cpp.

#include "binding.h"
#include "kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace {

namespace py = pybind11;
using at::Tensor;
using racecar::cuda::ChainLayer;
using racecar::cuda::ChainParams;
using racecar::cuda::Number;
using MaybeTensor = std::optional<Tensor>;
// The number of the activation and its parameters, as pointwise.h defines them.
using Act = std::tuple<int32_t, std::array<double, 3>>;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  TORCH_CHECK(error == cudaSuccess, "GPU ", device, " does not say what it has: ", cudaGetErrorString(error), " (",
              cudaGetErrorName(error), ")");
  return value;
}

// Rows one behind the other; a gradient may come as a view that only stands for -x.
Tensor rows_of(const Tensor &x) { return x.resolve_neg().contiguous(); }

// Without its tensors. `latents` begins with what acts on a_1, then come φ_1 .. φ_n.
class LinearChain {
public:
  LinearChain(std::vector<Act> latents, std::vector<bool> compare, bool full)
      : latents_(std::move(latents)), compare_(std::move(compare)), full_(full) {
    TORCH_CHECK_VALUE(!compare_.empty() && compare_.size() <= racecar::cuda::kMostLayers, "a chain has 1 to ",
                      racecar::cuda::kMostLayers, " layers, got ", compare_.size());
    TORCH_CHECK_VALUE(latents_.size() == compare_.size() + 1, "a chain of ", compare_.size(), " layers has ",
                      compare_.size() + 1, " latents, the input's included, got ", latents_.size());
    for (const auto &own : latents_)
      TORCH_CHECK_VALUE(std::get<0>(own) >= 0 && std::get<0>(own) < racecar::kActs, "there is no activation number ",
                        std::get<0>(own));
  }

  // Of shared memory: the least that a block can do with.
  int64_t shared_bytes(const std::vector<int64_t> &widths) const {
    return racecar::cuda::chain_shared(job(widths, Number::float32), racecar::cuda::kLeastTile, true);
  }

  std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> forward(const Tensor &x,
                                                                               const std::vector<Tensor> &weights,
                                                                               const std::vector<MaybeTensor> &biases,
                                                                               bool store, bool reverse) const;

  std::tuple<MaybeTensor, std::vector<MaybeTensor>, std::vector<MaybeTensor>, MaybeTensor>
  backward(const MaybeTensor &grad_out, const MaybeTensor &grad_losses, const Tensor &x,
           const std::vector<Tensor> &weights, const std::vector<MaybeTensor> &biases, const Tensor &out,
           const MaybeTensor &d, const MaybeTensor &a, bool needs_x, const std::vector<bool> &needs_weights,
           const std::vector<bool> &needs_biases) const;

private:
  ChainParams job(const std::vector<int64_t> &widths, Number number) const;
  ChainParams job(const Tensor &x, const std::vector<Tensor> &weights, const std::vector<MaybeTensor> &biases) const;

  std::vector<Act> latents_;
  std::vector<bool> compare_;
  bool full_;
};

ChainParams LinearChain::job(const std::vector<int64_t> &widths, Number number) const {
  TORCH_CHECK_VALUE(widths.size() == latents_.size(), "a chain of ", compare_.size(), " layers has ", latents_.size(),
                    " widths, got ", widths.size());
  ChainParams p{};
  p.count = static_cast<int32_t>(compare_.size()), p.full = full_;
  for (size_t m = 0; m < widths.size(); ++m) {
    TORCH_CHECK_VALUE(widths[m] >= 1 && widths[m] <= racecar::cuda::kMostWidth, "1 to ", racecar::cuda::kMostWidth,
                      " features are served, got ", widths[m]);
    p.width[m] = static_cast<int32_t>(widths[m]);
    const auto &[act, parameters] = latents_[m];
    (m == 0 ? p.input : p.layers[m - 1].latent) = racecar::cuda::chain_activation(number, act, parameters.data());
  }
  for (int32_t m = 0; m < p.count; ++m) {
    p.layers[m].compare = compare_[m];
    p.layers[m].reversed = full_ || compare_[m];
  }
  racecar::cuda::arrange(p);
  return p;
}

ChainParams LinearChain::job(const Tensor &x, const std::vector<Tensor> &weights,
                             const std::vector<MaybeTensor> &biases) const {
  racecar::cuda::check_on_gpu(x, "x");
  const auto fits = [&](const Tensor &t) { return t.device() == x.device() && t.scalar_type() == x.scalar_type(); };
  TORCH_CHECK_VALUE(weights.size() == compare_.size() && biases.size() == weights.size() && x.dim() > 0,
                    compare_.size(), " layers need as many weights and biases, and x features");
  std::vector<int64_t> widths{x.size(-1)};
  for (size_t m = 0; m < weights.size(); ++m) {
    const Tensor &w = weights[m];
    TORCH_CHECK_VALUE(fits(w) && w.dim() == 2 && w.size(1) == widths.back(), "weight ", m + 1,
                      " must be a matrix of x's device and type with ", widths.back(), " columns");
    widths.push_back(w.size(0));
    TORCH_CHECK_VALUE(!biases[m] || (fits(*biases[m]) && biases[m]->dim() == 1 && biases[m]->size(0) == w.size(0)),
                      "bias ", m + 1, " must be a vector of x's device and type with ", w.size(0), " numbers");
  }
  ChainParams p = job(widths, racecar::cuda::number_of(x.scalar_type(), "x"));
  for (int32_t m = 0; m < p.count; ++m) {
    ChainLayer &l = p.layers[m];
    l.weight = weights[m].const_data_ptr();
    l.weight_stride[0] = weights[m].stride(0), l.weight_stride[1] = weights[m].stride(1);
    if (biases[m])
      l.bias = biases[m]->const_data_ptr(), l.bias_stride = biases[m]->stride(0);
  }
  p.rows = x.numel() / widths.front();
  const int device = x.device().index();
  TORCH_CHECK_VALUE(racecar::cuda::cut(p, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                                       attribute(cudaDevAttrMultiProcessorCount, device)),
                    "the chain does not fit: it needs ",
                    racecar::cuda::chain_shared(p, racecar::cuda::kLeastTile, true),
                    " bytes of shared memory, and 1 to 2^31 rows; got ", p.rows);
  return p;
}

// Sums of all blocks. Where there is no memory for them, one block does all the work, and the result is right still.
Tensor workspace(ChainParams &p, bool backward, const at::TensorOptions &options) {
  const auto allocate = [&] {
    Tensor room = at::empty({racecar::cuda::partial_numbers(p, backward)}, options.dtype(at::kFloat));
    racecar::cuda::place_partials(p, backward, room.mutable_data_ptr<float>());
    return room;
  };
  try {
    return allocate();
  } catch (const c10::OutOfMemoryError &) {
    racecar::cuda::cut_into_one(p);
    return allocate();
  }
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>>
LinearChain::forward(const Tensor &given, const std::vector<Tensor> &weights, const std::vector<MaybeTensor> &biases,
                     bool store, bool reverse) const {
  const Tensor x = rows_of(given);
  ChainParams p = job(x, weights, biases);
  const c10::cuda::CUDAGuard guard(x.device());
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = p.width[p.count];
  const Tensor out = at::empty(sizes, x.options());
  const auto of_losses = x.options().dtype(at::kFloat);
  const Tensor losses = reverse ? at::empty({p.count}, of_losses) : at::zeros({p.count}, of_losses);
  p.x = x.const_data_ptr(), p.out = out.mutable_data_ptr(), p.losses = losses.mutable_data_ptr<float>();
  p.wants_losses = reverse;
  std::vector<Tensor> d, a;
  if (store) {
    d.push_back(at::empty({p.rows, p.kept_d}, x.options()));
    p.d = d.front().mutable_data_ptr(), p.keeps = 1;
  }
  if (store && reverse) {
    a.push_back(at::empty({p.rows, p.kept_a}, x.options()));
    p.a = a.front().mutable_data_ptr();
  }
  const Tensor room = workspace(p, false, x.options());
  const auto number = racecar::cuda::number_of(x.scalar_type(), "x");
  racecar::cuda::check_launch(racecar::cuda::linear_chain_forward(p, number, c10::cuda::getCurrentCUDAStream()),
                              "linear_chain_forward");
  return {out, losses, std::move(d), std::move(a)};
}

std::tuple<MaybeTensor, std::vector<MaybeTensor>, std::vector<MaybeTensor>, MaybeTensor>
LinearChain::backward(const MaybeTensor &grad_out, const MaybeTensor &grad_losses, const Tensor &given,
                      const std::vector<Tensor> &weights, const std::vector<MaybeTensor> &biases, const Tensor &out,
                      const MaybeTensor &d, const MaybeTensor &a, bool needs_x, const std::vector<bool> &needs_weights,
                      const std::vector<bool> &needs_biases) const {
  const Tensor x = rows_of(given);
  ChainParams p = job(x, weights, biases);
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(needs_weights.size() == weights.size() && needs_biases.size() == weights.size(), weights.size(),
                    " layers need to know as often whether a gradient is wanted");
  std::vector<Tensor> held; // until the launch
  const auto rows = [&](const MaybeTensor &t, int64_t features, const char *name) -> void * {
    if (!t)
      return nullptr;
    TORCH_CHECK_VALUE(t->device() == x.device() && t->scalar_type() == x.scalar_type() &&
                          t->numel() == p.rows * features,
                      name, " is not what this chain's forward gave, or takes");
    held.push_back(rows_of(*t));
    return const_cast<void *>(held.back().const_data_ptr()); // backward reads what forward wrote
  };
  p.x = x.const_data_ptr();
  p.grad_out = rows(grad_out, p.width[p.count], "grad_out");
  p.keeps = d.has_value();
  p.d = rows(d, p.kept_d, "d"), p.a = rows(a, p.kept_a, "a");
  p.out = d ? rows(out, p.width[p.count], "out") : nullptr;
  if (grad_losses) {
    TORCH_CHECK_VALUE(grad_losses->device() == x.device() && grad_losses->scalar_type() == at::kFloat &&
                          grad_losses->numel() == p.count,
                      "grad_losses must have ", p.count, " float32 numbers on x's device");
    held.push_back(rows_of(*grad_losses));
    p.grad_losses = held.back().const_data_ptr<float>();
  }
  MaybeTensor grad_x, losses;
  std::vector<MaybeTensor> of_weights(weights.size()), of_biases(weights.size());
  if (needs_x) {
    grad_x = at::empty(x.sizes(), x.options());
    p.grad_x = grad_x->mutable_data_ptr();
  }
  for (int32_t m = 0; m < p.count; ++m) {
    ChainLayer &l = p.layers[m];
    if (needs_weights[m]) {
      const Tensor &g = of_weights[m].emplace(at::empty_like(weights[m]));
      l.grad_weight = g.mutable_data_ptr();
      l.grad_weight_stride[0] = g.stride(0), l.grad_weight_stride[1] = g.stride(1);
    }
    if (needs_biases[m] && biases[m]) {
      const Tensor &g = of_biases[m].emplace(at::empty_like(*biases[m]));
      l.grad_bias = g.mutable_data_ptr(), l.grad_bias_stride = g.stride(0);
    }
  }
  p.wants_losses = grad_losses && !a && !full_;
  if (p.wants_losses) {
    losses = at::empty({p.count}, x.options().dtype(at::kFloat));
    p.losses = losses->mutable_data_ptr<float>();
  }
  const Tensor room = workspace(p, true, x.options());
  const auto number = racecar::cuda::number_of(x.scalar_type(), "x");
  racecar::cuda::check_launch(racecar::cuda::linear_chain_backward(p, number, c10::cuda::getCurrentCUDAStream()),
                              "linear_chain_backward");
  if (grad_x && !given.is_contiguous()) // a gradient has the layout of what it belongs to
    grad_x = at::empty_like(given).copy_(*grad_x);
  return {std::move(grad_x), std::move(of_weights), std::move(of_biases), std::move(losses)};
}

} // namespace

void bind_linear_chain(py::module_ &module) {
  using no_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<LinearChain>(module, "LinearChain", "A chain of narrow linear layers, without its tensors.")
      .def(py::init<std::vector<Act>, std::vector<bool>, bool>())
      .def("shared_bytes", &LinearChain::shared_bytes,
           "Shared memory that a block needs, by the widths of d_1 .. d_n+1.")
      .def("forward", &LinearChain::forward, no_gil())
      .def("backward", &LinearChain::backward, no_gil());
  module.def(
      "shared_limit", [](int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); },
      "Bytes of shared memory that a block may have on a GPU.");
}
