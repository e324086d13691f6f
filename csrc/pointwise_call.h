// From tensors to a job: checks what the kernels of pointwise.inl take for granted, and runs them over blocks.
#pragma once

#include "pointwise.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

namespace racecar {

const Level *&level_in_use();

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Geometry = std::array<int64_t, 2>; // of rows and of columns
using Window = std::optional<Geometry>;
// Image, weight, bias, stride, padding and dilation of a convolution.
using ConvolvedTensor = std::tuple<Tensor, Tensor, MaybeTensor, Geometry, Geometry, Geometry>;
// x, scale, shift, mean, the number of the activation, whether it is done, and its parameters. With a convolution that
// gives x, x is on the device `meta` and has a shape alone.
using LazyTensor = std::tuple<Tensor, MaybeTensor, MaybeTensor, MaybeTensor, int64_t, bool, std::array<double, 3>,
                              std::optional<ConvolvedTensor>>;

constexpr int64_t kRow = 512;        // elements of a tile's row, about: a few such rows fit the first-level cache
constexpr int64_t kBlock = 1 << 16;  // elements of a block, about
constexpr int64_t kWeightDepth = 16; // elements of a block for every sum of a weight's gradient, at least
constexpr int64_t kDepth = 32;       // elements of a block for every channel, at least: partial sums stay small

inline bool is_contiguous(const Tensor &x) { return x.is_contiguous(); }

// Batch, spatial dimensions, channels, in this order in memory; for any number of dimensions.
inline bool is_channels_last(const Tensor &x) {
  int64_t stride = 1;
  const auto fits = [&](int64_t d) {
    const bool ok = x.size(d) == 1 || x.stride(d) == stride;
    stride *= x.size(d);
    return ok;
  };
  bool all = fits(1);
  for (int64_t d = x.dim() - 1; d > 1; --d)
    all = fits(d) && all;
  return fits(0) && all;
}

inline Grid make_grid(const Tensor &x, bool last, const Window &window) {
  Grid g{};
  const int64_t batch = x.size(0), channels = x.size(1);
  const bool one = channels == 1;
  g.channels = channels;
  g.inner = last && !one ? channels : 1;
  g.kh = g.kw = 1;
  if (window && (*window != Geometry{1, 1})) {
    TORCH_CHECK(x.dim() == 4, "pooling needs a tensor (N, C, H, W), got one with ", x.dim(), " dimensions");
    g.kh = (*window)[0], g.kw = (*window)[1];
    g.outer = g.inner > 1 ? batch : batch * channels;
    g.height = x.size(2), g.width = x.size(3);
    TORCH_CHECK(g.kh >= 1 && g.kw >= 1 && g.kh <= g.height && g.kw <= g.width, "a pooling window of ", g.kh, " x ",
                g.kw, " does not fit an image of ", g.height, " x ", g.width);
  } else {
    g.outer = g.inner > 1 || one ? 1 : batch * channels;
    g.height = 1;
    g.width = x.numel() == 0 ? 0 : x.numel() / (g.outer * g.inner);
  }
  if (x.numel() == 0)
    return g; // no blocks
  g.h = g.height / g.kh, g.w = g.width / g.kw;
  const int64_t most = std::clamp<int64_t>(kRow / (g.kw * g.inner), 1, g.w);
  g.columns = (g.w + (g.w + most - 1) / most - 1) / ((g.w + most - 1) / most);
  g.tiles = (g.w + g.columns - 1) / g.columns;
  const int64_t tile = g.columns * g.kw * g.kh * g.inner;
  g.per_block = std::max<int64_t>(1, std::max(kBlock, kDepth * channels) / tile);
  g.blocks = (g.outer * g.h * g.tiles + g.per_block - 1) / g.per_block;
  g.rows = std::min(2 * g.kh - 1, g.height);
  g.row = std::min(g.columns * g.kw + g.kw - 1, g.width) * g.inner;
  g.apart = (g.rows - 1) * g.width * g.inner + g.row;
  g.scratch = (g.rows + 20) * (g.row * 8 + 64) + g.rows * 8 + 64;
  return g;
}

inline Type type_of(const Tensor &x) {
  switch (x.scalar_type()) {
  case at::kFloat:
    return Type::float32;
  case at::kDouble:
    return Type::float64;
  case at::kBFloat16:
    return Type::bfloat16;
  default:
    TORCH_CHECK(false, "the CPU kernels serve float32, float64 and bfloat16, got ", x.scalar_type());
  }
}

// One call: the tensors that have to fit each other, and what the kernels get of them.
class Call {
public:
  Job job{};

  Call(const Tensor &full, const Window &window, std::initializer_list<const Tensor *> others) : full_(full) {
    TORCH_CHECK(full.device().is_cpu() || full.is_meta(), "the CPU kernels need tensors on the CPU, got one on ",
                full.device());
    TORCH_CHECK(full.dim() >= 2, "a tensor (N, C, ...) is needed, got one with ", full.dim(), " dimension(s)");
    bool contiguous = is_contiguous(full), last = is_channels_last(full);
    for (const Tensor *other : others) {
      if (!other)
        continue;
      TORCH_CHECK(other->dim() == full.dim(), "tensors of ", full.dim(), " and of ", other->dim(), " dimensions");
      TORCH_CHECK(other->scalar_type() == full.scalar_type() && other->device().is_cpu(),
                  "all tensors need the same type and device, got ", full.scalar_type(), " on the CPU and ",
                  other->scalar_type(), " on ", other->device());
      contiguous = contiguous && is_contiguous(*other), last = last && is_channels_last(*other);
    }
    TORCH_CHECK(contiguous || last,
                "all tensors need to be contiguous, or all channels_last; their strides begin with ", full.strides());
    last_ = last && !(contiguous && full.size(1) == 1);
    job.grid = make_grid(full, last_, window);
    kernels_ = &level_in_use()->of_type[static_cast<int>(type_of(full))];
    pooled_sizes_ = full.sizes().vec();
    if (job.grid.kh * job.grid.kw > 1)
      pooled_sizes_[2] /= job.grid.kh, pooled_sizes_[3] /= job.grid.kw;
  }

  at::ScalarType wide() const { return full_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  const Kernels &kernels() const { return *kernels_; }

  void at_full(const Tensor &x, const char *name) const { fits(x, full_.sizes(), name); }
  void at_pooled(const Tensor &x, const char *name) const { fits(x, pooled_sizes_, name); }

  // The format of what has a shape alone is known; asking for one like it would run Python.
  Tensor empty_full() const {
    return full_.is_meta() ? at::empty(full_.sizes(), full_.options().device(at::kCPU), at::MemoryFormat::ChannelsLast)
                           : at::empty_like(full_);
  }

  Tensor empty_pooled() const {
    const auto format = last_ && full_.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    return at::empty(pooled_sizes_, full_.options().device(at::kCPU).memory_format(format));
  }

  // Values per channel, kept alive as long as this call.
  const void *per_channel(const Tensor &values, const char *name) {
    TORCH_CHECK(values.dim() == 1 && values.size(0) == full_.size(1), name, " needs ", full_.size(1),
                " values, one per channel, got ", values.sizes());
    kept_.push_back(values.to(at::kCPU, wide()).contiguous());
    return kept_.back().const_data_ptr();
  }

  // What is read; of d alone also by its convolution.
  Lazy lazy(const LazyTensor &tensor, bool is_d = false) {
    const auto &[x, scale, shift, mean, act, done, p, convolved] = tensor;
    TORCH_CHECK(x.device().is_cpu() || convolved, "a tensor without data, and no convolution that gives it");
    if (convolved) {
      TORCH_CHECK(is_d && x.is_same(full_), "what is computed of an image is d, which the rest is compared with");
      multiply(*convolved);
    }
    TORCH_CHECK(act >= 0 && act < kActs, "there is no activation number ", act);
    TORCH_CHECK(shift || !scale, "a scale needs a shift");
    TORCH_CHECK(!(shift && done), "what is done has no affine left");
    return {convolved ? nullptr : x.const_data_ptr(),
            scale ? per_channel(*scale, "scale") : nullptr,
            shift ? per_channel(*shift, "shift") : nullptr,
            mean ? per_channel(*mean, "mean") : nullptr,
            static_cast<Act>(act),
            done,
            {p[0], p[1], p[2]}};
  }

  // Room for one number per block.
  void sum_squares() {
    squares_.reset(new double[job.grid.blocks + 1]);
    job.squares = squares_.get();
  }

  // Their sum, in the order of the blocks.
  Tensor total_squares() const {
    double total = 0;
    for (int64_t b = 0; b < job.grid.blocks; ++b)
      total += job.squares[b];
    return at::scalar_tensor(total, at::TensorOptions().dtype(wide()));
  }

  // Room for two sums per channel and block.
  void sum_channels() {
    partials_ = at::empty({job.grid.blocks, 2, job.grid.channels}, at::kDouble);
    job.partials = partials_.mutable_data_ptr<double>();
  }

  // The convolution of `image` that gives the full size: what the kernels need to know of it.
  void convolve(const Tensor &image, const Tensor &weight, const Geometry &stride, const Geometry &padding,
                const Geometry &dilation) {
    TORCH_CHECK(job.grid.inner > 1 && full_.dim() == 4 && image.dim() == 4 && weight.dim() == 4,
                "convolutions of an image are computed for (N, C, H, W) in channels_last, C > 1");
    TORCH_CHECK(image.scalar_type() == full_.scalar_type() && weight.scalar_type() == full_.scalar_type() &&
                    image.device().is_cpu() && is_channels_last(image),
                "the image and the weight need the type ", full_.scalar_type(), ", and the image to be channels_last");
    TORCH_CHECK(image.size(0) == full_.size(0) && weight.size(0) == full_.size(1) && weight.size(1) == image.size(1),
                "an image ", image.sizes(), " and a weight ", weight.sizes(), " do not give ", full_.sizes());
    for (int d = 0; d < 2; ++d)
      TORCH_CHECK(stride[d] >= 1 && dilation[d] >= 1 && padding[d] >= 0 && weight.size(2 + d) >= 1,
                  "strides, dilations and kernels are at least 1, paddings at least 0");
    Image &i = job.image;
    std::array<int64_t, 2> size{};
    for (int d = 0; d < 2; ++d) {
      i.kernel[d] = weight.size(2 + d), i.stride[d] = stride[d], i.dilation[d] = dilation[d];
      const int64_t read = (full_.size(2 + d) - 1) * stride[d] + (weight.size(2 + d) - 1) * dilation[d] + 1;
      size[d] = std::max(image.size(2 + d) + padding[d], read);
    }
    i.channels = image.size(1), i.height = size[0], i.width = size[1];
    i.rows = full_.size(2), i.columns = full_.size(3);
    image_ = image.permute({0, 2, 3, 1});
    if (size[0] > image.size(2) || size[1] > image.size(3) || image.scalar_type() != wide()) {
      const Tensor padded = at::zeros({image.size(0), size[0], size[1], image.size(1)}, wide());
      padded.narrow(1, padding[0], image.size(2)).narrow(2, padding[1], image.size(3)).copy_(image_);
      image_ = padded;
    }
    i.x = image_.const_data_ptr();
    i.weights = weight.numel();
    weight_ = weight;
  }

  // Instead of the result: the gradient of the convolution's weight, in whose shape and layout it comes.
  void sum_weight() {
    Image &i = job.image;
    if (Grid &g = job.grid; g.blocks > 0) { // blocks so large that what they sum is an eighth of c at most
      g.per_block = std::max(g.per_block, kWeightDepth * i.weights / (g.columns * g.kw * g.kh * g.inner));
      g.blocks = (g.outer * g.h * g.tiles + g.per_block - 1) / g.per_block;
    }
    weights_ = at::empty({job.grid.blocks, i.kernel[0], i.kernel[1], i.channels, full_.size(1)}, at::kDouble);
    i.gradients = weights_.mutable_data_ptr<double>();
    job.grid.scratch += ((job.grid.rows + 1) * job.grid.row + 2 * i.weights) * 8 + 320;
  }

  // Its sum over all blocks, in double.
  Tensor weight_sum() const { return at::empty_like(weight_).copy_(weights_.sum(0).permute({3, 2, 0, 1})); }

  // Both sums over all blocks, in double, in the order of the blocks.
  std::array<Tensor, 2> channel_sums() const {
    const int64_t c = job.grid.channels;
    std::array<Tensor, 2> sums = {at::zeros({c}, at::kDouble), at::zeros({c}, at::kDouble)};
    double *first = sums[0].mutable_data_ptr<double>(), *second = sums[1].mutable_data_ptr<double>();
    for (int64_t b = 0; b < job.grid.blocks; ++b) {
      const double *const of_block = job.partials + b * 2 * c;
      for (int64_t i = 0; i < c; ++i)
        first[i] += of_block[i], second[i] += of_block[c + i];
    }
    return sums;
  }

  // Each block on one thread, whichever; the partition into blocks depends on the shape alone.
  void run(Kernel kernel) const {
    const Grid &g = job.grid;
    at::parallel_for(0, g.blocks, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> scratch(new char[g.scratch]);
      for (int64_t block = begin; block < end; ++block)
        kernel(job, block, scratch.get());
    });
  }

private:
  // The convolution, with its weight and bias as the kernels read them.
  void multiply(const ConvolvedTensor &convolved) {
    const auto &[image, weight, bias, stride, padding, dilation] = convolved;
    convolve(image, weight, stride, padding, dilation);
    kept_.push_back(weight.permute({2, 3, 1, 0}).to(wide()).contiguous());
    Image &i = job.image;
    i.weight = kept_.back().const_data_ptr();
    if (bias)
      i.bias = per_channel(*bias, "bias");
    job.grid.scratch += (job.grid.apart + job.grid.row + i.weights) * 8 + 256;
  }

  void fits(const Tensor &x, at::IntArrayRef sizes, const char *name) const {
    TORCH_CHECK(x.sizes() == sizes, name, " needs the shape ", sizes, ", got ", x.sizes());
  }

  Tensor full_, image_, partials_, weight_, weights_;
  std::unique_ptr<double[]> squares_;
  bool last_ = false;
  const Kernels *kernels_ = nullptr;
  std::vector<int64_t> pooled_sizes_;
  std::vector<Tensor> kept_;
};

} // namespace racecar
