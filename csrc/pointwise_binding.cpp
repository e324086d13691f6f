// The pointwise family for PyTorch: allocates and runs the kernels of pointwise.inl. What a function computes is said
// in racecar_kernels/pointwise.py, which is the one that calls it.

#include "binding.h"
#include "pointwise_call.h"
#include "tape.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using racecar::Call;
using racecar::Geometry;
using racecar::Kernel;
using racecar::LazyTensor;
using racecar::Level;
using racecar::MaybeTensor;
using racecar::Window;

// --- the level of SIMD instructions -----------------------------------------------------------------------------

std::vector<const Level *> levels_here() {
  std::vector<const Level *> levels;
#if defined(RACECAR_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    levels.push_back(&racecar::avx512_level);
  if (avx2)
    levels.push_back(&racecar::avx2_level);
#endif
  levels.push_back(&racecar::baseline_level);
  return levels;
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Level *level : levels_here())
    names.emplace_back(level->name);
  return names;
}

std::string simd_level() { return racecar::level_in_use()->name; }

void set_simd_level(const std::string &name) {
  for (const Level *level : levels_here())
    if (name == level->name) {
      racecar::level_in_use() = level;
      return;
    }
  TORCH_CHECK(false, "this processor has no SIMD level ", name, "; it has ", simd_levels());
}

const Tensor *pointer(const MaybeTensor &x) { return x ? &*x : nullptr; }
const Tensor &tensor_of(const LazyTensor &lazy) { return std::get<0>(lazy); }
void *writable(const Tensor &x) { return x.mutable_data_ptr(); }

// Whether the kernels take these tensors together; why not, says racecar_kernels/pointwise.py.
bool serves(const std::vector<Tensor> &tensors, bool pooled) {
  const Tensor &first = tensors.front();
  const auto type = first.scalar_type();
  if (first.dim() < 2 || (pooled && first.dim() != 4) ||
      (type != at::kFloat && type != at::kDouble && type != at::kBFloat16))
    return false;
  bool contiguous = true, last = true;
  for (const Tensor &t : tensors) {
    if (!t.device().is_cpu() || t.scalar_type() != type || t.layout() != at::kStrided || t.dim() != first.dim() ||
        t.is_neg())
      return false;
    contiguous = contiguous && racecar::is_contiguous(t), last = last && racecar::is_channels_last(t);
  }
  return contiguous || last;
}

// --- the functions ----------------------------------------------------------------------------------------------

// Mean and biased variance per channel.
std::tuple<Tensor, Tensor> channel_stats(const Tensor &x) {
  Call call(x, {}, {});
  const int64_t channels = x.size(1), count = channels ? x.numel() / channels : 0;
  Tensor origin = at::zeros({channels}, at::kDouble);
  if (count > 0) { // a channel's own first value is at most sqrt(count) deviations away from its mean
    Tensor first = x.select(0, 0);
    while (first.dim() > 1)
      first = first.select(1, 0);
    first = first.to(call.wide());
    origin = at::where(at::isfinite(first), first, 0).to(at::kDouble);
  }
  call.job.d.x = x.const_data_ptr();
  call.job.k[0] = call.per_channel(origin, "origin");
  call.sum_channels();
  call.run(call.kernels().sums);
  const auto [sum, squares] = call.channel_sums();
  const Tensor off = sum / static_cast<double>(count);
  const Tensor var = (squares / static_cast<double>(count) - off * off).clamp_min_(0);
  return {(origin + off).to(call.wide()), var.to(call.wide())};
}

Tensor channel_sum(const Tensor &g) {
  Call call(g, {}, {});
  call.job.d.x = g.const_data_ptr();
  call.sum_channels();
  call.run(call.kernels().sums);
  return call.channel_sums()[0].to(call.wide());
}

std::tuple<MaybeTensor, MaybeTensor> materialise(const LazyTensor &lazy, const Window &window, bool full, bool pooled,
                                                 const MaybeTensor &out, const MaybeTensor &minus) {
  const Tensor &x = tensor_of(lazy);
  Call call(x, window, {pointer(out)});
  call.job.d = call.lazy(lazy, true);
  if (minus)
    call.job.k[0] = call.per_channel(*minus, "minus");
  MaybeTensor whole = out, small;
  if (out)
    call.at_full(*out, "out");
  else if (full)
    whole = call.empty_full();
  if (whole)
    call.job.out = writable(*whole);
  if (pooled) {
    small = call.empty_pooled();
    call.job.out_pooled = writable(*small);
  }
  call.run(call.kernels().materialise);
  return {whole, small};
}

std::tuple<Tensor, MaybeTensor> compare(const LazyTensor &d, const LazyTensor &a, const Window &window, bool source,
                                        const MaybeTensor &minus) {
  Call call(tensor_of(d), window, {&tensor_of(a)});
  call.at_pooled(tensor_of(a), "a");
  call.job.d = call.lazy(d, true);
  call.job.a = call.lazy(a);
  if (minus)
    call.job.k[0] = call.per_channel(*minus, "minus");
  MaybeTensor out;
  if (source) {
    out = at::empty_like(tensor_of(a));
    call.job.out = writable(*out);
  }
  call.sum_squares();
  call.run(call.kernels().sum_of_squares);
  return {call.total_squares(), out};
}

// The gradient, Σ g and Σ g·(x - mean) per channel, Σ (d - undo(a))².
using Gradient = std::tuple<Tensor, MaybeTensor, MaybeTensor, MaybeTensor>;

// Runs one of the two gradient kernels over a job that is complete but for its result and its sums.
Gradient gradient(Call &call, Kernel kernel, bool affine, bool sums, const MaybeTensor &g, const MaybeTensor &into) {
  sums = sums || affine;
  TORCH_CHECK(into, "in_place writes over the gradient that comes in, but there is none");
  const Tensor &out = *into;
  call.job.g = g ? g->const_data_ptr() : nullptr;
  call.job.out = writable(out);
  if (sums)
    call.sum_channels();
  call.run(kernel);
  MaybeTensor loss;
  if (call.job.squares)
    loss = call.total_squares();
  if (!sums)
    return {out, std::nullopt, std::nullopt, loss};
  const auto [sum, with_x] = call.channel_sums();
  const auto wide = call.wide();
  return {out, sum.to(wide), affine ? MaybeTensor(with_x.to(wide)) : std::nullopt, loss};
}

// Twice the gradient of the sum of squares, one number.
void take_c2(Call &call, const MaybeTensor &c2) {
  call.job.loss = c2.has_value();
  call.job.c2 = c2 ? c2->item<double>() : 0;
}

Gradient grad_reverse(const LazyTensor &d, const LazyTensor &a, const Window &window, const MaybeTensor &c2,
                      const MaybeTensor &g_in, bool in_place, bool sums, bool loss) {
  TORCH_CHECK(c2 || !loss, "the sum of squares needs c2, with which the residual is looked at");
  Call call(tensor_of(d), window, {&tensor_of(a), pointer(g_in)});
  call.at_pooled(tensor_of(a), "a");
  if (g_in)
    call.at_pooled(*g_in, "g_in");
  call.job.d = call.lazy(d, true);
  call.job.a = call.lazy(a);
  take_c2(call, c2);
  if (loss)
    call.sum_squares();
  return gradient(call, call.kernels().grad_reverse, std::get<2>(a).has_value(), sums, g_in,
                  in_place ? g_in : MaybeTensor(at::empty_like(tensor_of(a))));
}

// Checks what comes into the forward's gradient, and puts it into the job.
void take_incoming(Call &call, const LazyTensor &d, const std::optional<LazyTensor> &a, const MaybeTensor &c2,
                   const MaybeTensor &g_pooled, const MaybeTensor &g_full) {
  TORCH_CHECK(a || !c2, "c2 needs a, from which the residual is taken");
  if (a)
    call.at_pooled(tensor_of(*a), "a");
  if (g_pooled)
    call.at_pooled(*g_pooled, "g_pooled");
  if (g_full)
    call.at_full(*g_full, "g_full");
  call.job.d = call.lazy(d, true);
  if (a)
    call.job.a = call.lazy(*a);
  take_c2(call, c2);
  call.job.pooled = g_pooled ? g_pooled->const_data_ptr() : nullptr;
}

Gradient grad_forward(const LazyTensor &d, const std::optional<LazyTensor> &a, const Window &window,
                      const MaybeTensor &c2, const MaybeTensor &g_pooled, const MaybeTensor &g_full, bool in_place,
                      bool sums) {
  Call call(tensor_of(d), window, {a ? &tensor_of(*a) : nullptr, pointer(g_pooled), pointer(g_full)});
  take_incoming(call, d, a, c2, g_pooled, g_full);
  return gradient(call, call.kernels().grad_forward, std::get<2>(d).has_value(), sums, g_full,
                  in_place ? g_full : MaybeTensor(call.empty_full()));
}

// The gradient of the weight whose convolution of `image` gave d.x, and of its bias where that is wanted.
std::tuple<Tensor, MaybeTensor> grad_weight(const LazyTensor &d, const std::optional<LazyTensor> &a,
                                            const Window &window, const MaybeTensor &c2, const MaybeTensor &g_pooled,
                                            const MaybeTensor &g_full, const Tensor &image, const Tensor &weight,
                                            const Geometry &stride, const Geometry &padding, const Geometry &dilation,
                                            bool sums) {
  TORCH_CHECK(!std::get<2>(d), "behind an affine the gradient of the weight needs the gradient of its input first");
  Call call(tensor_of(d), window, {a ? &tensor_of(*a) : nullptr, pointer(g_pooled), pointer(g_full)});
  take_incoming(call, d, a, c2, g_pooled, g_full);
  call.job.g = g_full ? g_full->const_data_ptr() : nullptr;
  call.convolve(image, weight, stride, padding, dilation);
  call.sum_weight();
  if (sums)
    call.sum_channels();
  call.run(call.kernels().grad_forward);
  return {call.weight_sum(), sums ? MaybeTensor(call.channel_sums()[0].to(call.wide())) : std::nullopt};
}

Tensor norm_input_grad_(const Tensor &g, const Tensor &x, const Tensor &mean, const Tensor &k0, const Tensor &k1,
                        const Tensor &k2) {
  Call call(g, {}, {&x});
  call.at_full(x, "x");
  call.job.g = g.const_data_ptr();
  call.job.d.x = x.const_data_ptr();
  call.job.k[0] = call.per_channel(k0, "k0");
  call.job.k[1] = call.per_channel(k1, "k1");
  call.job.k[2] = call.per_channel(k2, "k2");
  call.job.k[3] = call.per_channel(mean, "mean");
  call.job.out = writable(g);
  call.run(call.kernels().combine);
  return g;
}

// Mean and 1/deviation of the batch, and the affine that a norm with this scale and shift then is.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm(const Tensor &x, const MaybeTensor &weight,
                                                      const MaybeTensor &bias, double eps) {
  const auto [mean, var] = channel_stats(x);
  const Tensor rstd = (var + eps).rsqrt_();
  const Tensor scale = weight ? rstd * weight->reshape(-1) : rstd;
  const Tensor shift = bias ? bias->reshape(-1) - mean * scale : -(mean * scale);
  return {mean, rstd, scale, shift};
}

// g = scale · (g - sum / n - (x - mean) · rstd² · with_x / n) in place: the gradient of the norm's input.
Tensor batch_norm_backward_(const Tensor &g, const Tensor &x, const Tensor &scale, const Tensor &mean,
                            const Tensor &rstd, const Tensor &sum, const Tensor &with_x) {
  const double n = static_cast<double>(x.numel()) / static_cast<double>(std::max<int64_t>(1, x.size(1)));
  const Tensor per = scale / -n;
  return norm_input_grad_(g, x, mean, scale, with_x * rstd.square().mul_(per), sum * per);
}

} // namespace

const Level *&racecar::level_in_use() {
  static const Level *level = levels_here().front();
  return level;
}

const char *simd_level_name() { return racecar::level_in_use()->name; }

void bind_pointwise(pybind11::module_ &module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  module.def("simd_levels", &simd_levels, "Levels of SIMD instructions that this processor has, the best one first.");
  module.def("simd_level", &simd_level, "The level in use.");
  module.def("set_simd_level", &set_simd_level, "Chooses a level, for tests and measurements; not while kernels run.");
  module.def("serves", &serves);
  racecar::define(module, "channel_sum", &channel_sum, no_gil);
  racecar::define(module, "materialise", &materialise, no_gil);
  racecar::define(module, "compare", &compare, no_gil);
  racecar::define(module, "grad_reverse", &grad_reverse, no_gil);
  racecar::define(module, "grad_forward", &grad_forward, no_gil);
  racecar::define(module, "grad_weight", &grad_weight, no_gil);
  racecar::define(module, "norm_input_grad_", &norm_input_grad_, no_gil);
  racecar::define(module, "batch_norm", &batch_norm, no_gil);
  racecar::define(module, "batch_norm_backward_", &batch_norm_backward_, no_gil);
}
