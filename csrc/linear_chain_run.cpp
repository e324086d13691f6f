// Turns tensors into a job for the kernels of linear_chain.inl, runs it over chunks of the batch, and adds up what the
// chunks found.

#include "linear_chain_run.h"

#include "binding.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>

namespace racecar {

namespace {

using at::Tensor;

constexpr int64_t kChunkWork = 1 << 19; // multiplications of a chunk's forward, about: enough to be worth a thread
constexpr int64_t kLeastRows = 4 * kChainRows;

const ChainLevel &level_in_use() {
#if defined(RACECAR_X86_LEVELS)
  const char *const name = simd_level_name();
  if (!std::strcmp(name, avx512_chain_level.name))
    return avx512_chain_level;
  if (!std::strcmp(name, avx2_chain_level.name))
    return avx2_chain_level;
#endif
  return baseline_chain_level;
}

bool is_served(at::ScalarType type) { return type == at::kFloat || type == at::kDouble || type == at::kBFloat16; }

Type type_of(at::ScalarType type) {
  return type == at::kDouble ? Type::float64 : type == at::kFloat ? Type::float32 : Type::bfloat16;
}

at::ScalarType wide(const Tensor &x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Rows one behind the other; a gradient may come as a view that only stands for -x.
Tensor rows_of(const Tensor &x) { return x.resolve_neg().contiguous(); }

// Copies a matrix or a vector into dense memory of the type that is computed in.
template <class S, class T> void gather(const Tensor &from, T *to) {
  const S *const at = from.const_data_ptr<S>();
  const int64_t rows = from.dim() == 2 ? from.size(0) : 1, columns = from.size(-1);
  const int64_t down = from.dim() == 2 ? from.stride(0) : 0, across = from.stride(-1);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      *to++ = static_cast<T>(at[r * down + c * across]);
}

// The other way round, for a gradient in its parameter's memory layout.
template <class S> void scatter(const double *from, const Tensor &to) {
  S *const at = to.mutable_data_ptr<S>();
  const int64_t rows = to.dim() == 2 ? to.size(0) : 1, columns = to.size(-1);
  const int64_t down = to.dim() == 2 ? to.stride(0) : 0, across = to.stride(-1);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      at[r * down + c * across] = static_cast<S>(static_cast<float>(*from++));
}
template <> void scatter<double>(const double *from, const Tensor &to) {
  double *const at = to.mutable_data_ptr<double>();
  const int64_t rows = to.dim() == 2 ? to.size(0) : 1, columns = to.size(-1);
  const int64_t down = to.dim() == 2 ? to.stride(0) : 0, across = to.stride(-1);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      at[r * down + c * across] = *from++;
}

void scatter_as(at::ScalarType type, const double *from, const Tensor &to) {
  if (type == at::kDouble)
    scatter<double>(from, to);
  else if (type == at::kFloat)
    scatter<float>(from, to);
  else
    scatter<at::BFloat16>(from, to);
}

// Sums over the chunks, in their order: chunk 0's numbers become the total.
double *total_of(double *partials, int64_t chunks, int64_t count) {
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < count; ++i)
      partials[i] += partials[chunk * count + i];
  return partials;
}

// Twice the gradient of every loss.
std::vector<double> doubled(const Tensor &given) {
  const Tensor g = given.resolve_neg();
  std::vector<double> values(g.size(0));
  for (int64_t m = 0; m < g.size(0); ++m) {
    const int64_t at = m * g.stride(0);
    values[m] = 2 * (g.scalar_type() == at::kDouble ? g.const_data_ptr<double>()[at]
                                                    : static_cast<double>(g.const_data_ptr<float>()[at]));
  }
  return values;
}

} // namespace

// One call: the job, and the memory that it points into.
class ChainCall {
public:
  LinearChainJob job{};

  ChainCall(const LinearChain &chain, const Tensor &x, const Gradients &weights, const std::vector<MaybeTensor> &biases)
      : x_(rows_of(x)), options_(x.options()) {
    const int64_t n = static_cast<int64_t>(weights.size());
    layers_.resize(weights.size());
    for (int64_t m = 0, d = 0, a = 0, params = 0; m < n; ++m) {
      LinearLayer &l = layers_[m];
      l.in = weights[m].size(1), l.out = weights[m].size(0);
      l.d = d, l.kept_a = a, l.params = params;
      l.latent = chain.latents_[m + 1];
      l.compare = chain.compare_[m], l.reversed = chain.full_ || l.compare;
      d += l.in, a += l.reversed ? l.in : 0, params += l.in * l.out + (biases[m] ? l.out : 0);
      job.kept_a = a, job.params = params, job.features = d + l.out;
      job.widest = std::max({job.widest, l.in, l.out});
      work_ += l.in * l.out;
    }
    take_parameters(weights, biases);
    job.layers = layers_.data(), job.count = n;
    job.input = chain.latents_[0], job.full = chain.full_;
    job.kept_d = job.features - layers_.front().in - layers_.back().out;
    job.rows = x.numel() / layers_.front().in;
    const int64_t rows = std::max(kLeastRows, kChunkWork / work_);
    job.chunk_rows = (rows + kChainRows - 1) / kChainRows * kChainRows;
    job.chunks = (job.rows + job.chunk_rows - 1) / job.chunk_rows;
    job.x = x_.const_data_ptr();
  }

  LinearLayer &layer(int64_t m) { return layers_[m]; }
  Tensor empty_kept(int64_t features) const { return at::empty({job.rows, features}, options_); }

  double *losses_of_chunks() {
    losses_.reset(new double[job.chunks * job.count]());
    return job.losses = losses_.get();
  }

  Tensor losses() const {
    Tensor found = at::empty({job.count}, options_.dtype(wide(x_)));
    const double *const total = losses_ ? total_of(losses_.get(), job.chunks, job.count) : nullptr;
    for (int64_t m = 0; m < job.count; ++m)
      if (wide(x_) == at::kDouble)
        found.mutable_data_ptr<double>()[m] = total ? total[m] : 0;
      else
        found.mutable_data_ptr<float>()[m] = total ? static_cast<float>(total[m]) : 0;
    return found;
  }

  void run(bool backward) const {
    const ChainKernels &kernels = level_in_use().of_type[static_cast<int>(type_of(x_.scalar_type()))];
    const int64_t bytes = chain_scratch(job, x_.scalar_type() == at::kDouble ? 8 : 4, backward);
    at::parallel_for(0, job.chunks, 1, [&](int64_t begin, int64_t end) {
      const at::DataPtr scratch = at::getCPUAllocator()->allocate(bytes); // PyTorch's, so that its profiler sees it
      for (int64_t chunk = begin; chunk < end; ++chunk)
        (backward ? kernels.backward : kernels.forward)(job, chunk, scratch.get());
    });
  }

private:
  void take_parameters(const Gradients &weights, const std::vector<MaybeTensor> &biases) {
    const at::ScalarType type = x_.scalar_type();
    const int64_t size = type == at::kDouble ? 8 : 4;
    parameters_.reset(new char[job.params * size]);
    char *to = parameters_.get();
    const auto take = [&](const Tensor &t) {
      const void *const begin = to;
      if (type == at::kDouble)
        gather<double>(t, reinterpret_cast<double *>(to));
      else if (type == at::kFloat)
        gather<float>(t, reinterpret_cast<float *>(to));
      else
        gather<at::BFloat16>(t, reinterpret_cast<float *>(to));
      to += t.numel() * size;
      return begin;
    };
    for (size_t m = 0; m < weights.size(); ++m) {
      layers_[m].weight = take(weights[m]);
      layers_[m].bias = biases[m] ? take(*biases[m]) : nullptr;
    }
  }

  Tensor x_;
  at::TensorOptions options_;
  std::vector<LinearLayer> layers_;
  std::unique_ptr<char[]> parameters_;
  std::unique_ptr<double[]> losses_;
  int64_t work_ = 0;
};

bool LinearChain::serves(const Tensor &x, const Gradients &weights, const std::vector<MaybeTensor> &biases) const {
  const auto fits = [&](const Tensor &t) {
    return t.device().is_cpu() && t.layout() == at::kStrided && t.scalar_type() == x.scalar_type() && t.numel() > 0;
  };
  if (weights.size() != compare_.size() || biases.size() != weights.size() || x.dim() < 1 || !fits(x) ||
      !is_served(x.scalar_type()) || x.size(-1) > widest_)
    return false;
  int64_t features = x.size(-1);
  for (size_t m = 0; m < weights.size(); ++m) {
    const Tensor &w = weights[m];
    if (!fits(w) || w.dim() != 2 || w.size(1) != features || w.size(0) > widest_)
      return false;
    features = w.size(0);
    if (biases[m] && (!fits(*biases[m]) || biases[m]->dim() != 1 || biases[m]->size(0) != features))
      return false;
  }
  return true;
}

ChainForward LinearChain::forward(const Tensor &x, const Gradients &weights, const std::vector<MaybeTensor> &biases,
                                  bool store, bool reverse) const {
  TORCH_CHECK(serves(x, weights, biases), "these tensors are not those of a chain of linear layers on the CPU");
  ChainCall call(*this, x, weights, biases);
  LinearChainJob &job = call.job;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weights.back().size(0);
  ChainForward found{at::empty(sizes, x.options()), {}, {}, {}};
  job.out = found.out.mutable_data_ptr();
  if (store) {
    found.d = call.empty_kept(job.kept_d);
    job.d = found.d.mutable_data_ptr();
  }
  if (store && reverse) {
    found.a = call.empty_kept(job.kept_a);
    job.a = found.a.mutable_data_ptr();
  }
  if (reverse)
    call.losses_of_chunks();
  call.run(false);
  found.losses = call.losses();
  return found;
}

ChainBackward LinearChain::backward(const MaybeTensor &grad_out, const MaybeTensor &grad_losses, const Tensor &x,
                                    const Gradients &weights, const std::vector<MaybeTensor> &biases, const Tensor &out,
                                    const MaybeTensor &d, const MaybeTensor &a, const ChainNeeds &needs) const {
  TORCH_CHECK(serves(x, weights, biases), "these tensors are not those of a chain of linear layers on the CPU");
  ChainCall call(*this, x, weights, biases);
  LinearChainJob &job = call.job;
  ChainBackward found;
  const Tensor incoming = grad_out ? rows_of(*grad_out) : Tensor();
  const std::vector<double> twice = grad_losses ? doubled(*grad_losses) : std::vector<double>();
  const auto held = [&](const MaybeTensor &t, int64_t features, const char *name) { // hooks may have laid it out anew
    TORCH_CHECK(!t || (t->scalar_type() == x.scalar_type() && t->numel() == job.rows * features), name,
                " is not what this chain's forward gave");
    return t ? rows_of(*t) : Tensor();
  };
  TORCH_CHECK(!grad_losses || grad_losses->numel() == job.count, "one gradient per loss is needed");
  const int64_t last = weights.back().size(0);
  TORCH_CHECK(!grad_out || grad_out->numel() == job.rows * last, "the output's gradient needs the output's shape");
  const Tensor kept_d = held(d, job.kept_d, "d"), kept_a = held(a, job.kept_a, "a"),
               given = d ? held(out, last, "out") : Tensor();
  const auto address = [](const Tensor &t) {
    return const_cast<void *>(t.defined() ? t.const_data_ptr() : nullptr); // backward reads what forward wrote
  };
  job.grad_out = incoming.defined() ? incoming.const_data_ptr() : nullptr;
  job.twice = grad_losses ? twice.data() : nullptr;
  job.d = address(kept_d), job.a = address(kept_a), job.out = d ? address(given) : nullptr;
  Tensor grad_x;
  if (needs.x) {
    grad_x = at::empty(x.sizes(), x.options());
    job.grad_x = grad_x.mutable_data_ptr();
  }
  for (int64_t m = 0; m < job.count; ++m)
    call.layer(m).needs_weight = needs.weights[m];
  if (job.twice && !a && !full_)
    call.losses_of_chunks();
  const Tensor partials = at::empty({job.chunks * job.params}, at::kDouble);
  job.grads = partials.mutable_data_ptr<double>();
  call.run(true);
  const double *from = total_of(job.grads, job.chunks, job.params);
  for (size_t m = 0; m < weights.size(); ++m) {
    const auto take = [&](const Tensor &like, bool needed) {
      Tensor g = needed ? at::empty_like(like) : Tensor();
      if (needed)
        scatter_as(x.scalar_type(), from, g);
      from += like.numel();
      return g;
    };
    found.weights.push_back(take(weights[m], needs.weights[m]));
    found.biases.push_back(biases[m] ? take(*biases[m], needs.biases[m]) : Tensor());
  }
  found.x = needs.x && !x.is_contiguous() ? at::empty_like(x).copy_(grad_x) : grad_x;
  if (job.losses)
    found.losses = call.losses();
  return found;
}

} // namespace racecar
