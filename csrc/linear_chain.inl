// The kernels of a chain of linear layers, compiled by level.inl for each level of SIMD instructions. RACECAR_NAMESPACE
// is the level's own namespace, so that the linker never mixes the levels up; RACECAR_CHAIN_LEVEL names the table. For
// the same reason nothing of the standard library is instantiated here.
//
// A block of rows goes through the whole chain, forth and back, before the next one begins: memory sees the input, the
// output and what is kept, nothing else.

namespace racecar {
namespace RACECAR_NAMESPACE {

#include "pointwise_math.inl"

#include "linear_chain_rows.inl"

// One block of rows on its way through the chain.
template <class S> class Block {
public:
  using Store = Storage<S>;
  using T = typename Store::T;

  Block(const LinearChainJob &given, void *scratch, bool backward) : job(given) {
    char *next = static_cast<char *>(scratch);
    next += (64 - (bit_cast<uintptr_t>(next) & 63)) & 63;
    T *at = bit_cast<T *>(next);
    const auto take = [&at](int64_t n) {
      T *const piece = at;
      at += n;
      return piece;
    };
    d_ = take(job.features * kRows);
    a_ = take(job.features * kRows);
    for (T *&work : work_)
      work = take(job.widest * kRows);
    if (backward) {
      sums_ = take(job.params * kLanes<T>);
      each(job.params * kLanes<T>, [sums = sums_](int64_t i) { sums[i] = 0; });
    }
  }

  void move_to(int64_t row) {
    begin = row;
    n = job.rows - row < kRows ? job.rows - row : kRows;
  }

  void forward();
  void reverse(double *losses);
  void keep();
  void recall(double *losses);
  void backward();
  void drain(double *grads) const;

private:
  const LinearLayer &layer(int64_t m) const { return job.layers[m]; }
  T *d(int64_t m) { return d_ + (m < job.count ? layer(m).d : job.features - layer(m - 1).out) * kRows; }
  T *a(int64_t m) { return a_ + layer(m).d * kRows; }
  const Elementwise &below(int64_t m) const { return m ? layer(m - 1).latent : job.input; }
  static const T *numbers(const void *p) { return static_cast<const T *>(p); }
  T *weight_sums(const LinearLayer &l) { return sums_ + l.params * kLanes<T>; }
  T *bias_sums(const LinearLayer &l) { return weight_sums(l) + l.in * l.out * kLanes<T>; }
  T twice(const LinearLayer &l) const { return static_cast<T>(job.twice[&l - job.layers]); }
  void next_work() {
    T *const first = work_[0];
    work_[0] = work_[1], work_[1] = first;
  }

  void activate_in_place(const Elementwise &e, int64_t features, T *u);
  void differentiate_in_place(const Elementwise &e, int64_t features, const T *a, T *g);
  const T *minus_bias(const LinearLayer &l, const T *y);
  double loss(int64_t features, const T *d, const T *a);
  void through_reverse(int64_t m, const T *y, bool incoming);
  void through_forward(int64_t m, T *&g);

  const LinearChainJob &job;
  int64_t begin = 0, n = 0;
  T *d_, *a_, *work_[4], *sums_ = nullptr; // work: gradient in hand and the next one, y - b, gradient of the forward
};

// φ, rounded as a tensor would be.
template <class S> void Block<S>::activate_in_place(const Elementwise &e, int64_t features, T *u) {
  with_constant(e.act, [=, p = rounded<S>(e.act, e.p)](auto tag) {
    each(features * kRows, [=](int64_t i) { u[i] = Store::load(Store::store(activate<decltype(tag)::act>(u[i], p))); });
  });
}

template <class S> void Block<S>::differentiate_in_place(const Elementwise &e, int64_t features, const T *a, T *g) {
  with_constant(e.act, [=, p = rounded<S>(e.act, e.p)](auto tag) {
    if (decltype(tag)::act != Act::identity)
      each(features * kRows, [=](int64_t i) { g[i] = differentiate<decltype(tag)::act>(g[i], a[i], p); });
  });
}

template <class S> const typename Block<S>::T *Block<S>::minus_bias(const LinearLayer &l, const T *y) {
  if (!l.bias)
    return y;
  for (int64_t o = 0; o < l.out; ++o)
    each(kRows, [=, to = work_[2] + o * kRows, from = y + o * kRows, b = numbers(l.bias)[o]](int64_t r) {
      to[r] = Store::load(Store::store(from[r] - b));
    });
  return work_[2];
}

template <class S> double Block<S>::loss(int64_t features, const T *d, const T *a) {
  double total = 0;
  if (n < kRows) {
    for (int64_t f = 0; f < features; ++f)
      for (int64_t r = f * kRows; r < f * kRows + n; ++r)
        total += static_cast<double>((d[r] - a[r]) * (d[r] - a[r]));
    return total;
  }
  constexpr int64_t lanes = kLanes<T>;
  Pack<T> low{}, high{};
  for (int64_t i = 0; i < features * kRows; i += 2 * lanes) {
    const Pack<T> x = pack(d + i) - pack(a + i), y = pack(d + i + lanes) - pack(a + i + lanes);
    low = fused(x, x, low), high = fused(y, y, high);
  }
  T sum[lanes];
  unpack(low + high, sum);
  for (int64_t i = 0; i < lanes; ++i)
    total += static_cast<double>(sum[i]);
  return total;
}

template <class S> void Block<S>::forward() {
  load_rows(static_cast<const S *>(job.x) + begin * layer(0).in, n, layer(0).in, d(0));
  for (int64_t m = 0; m < job.count; ++m) {
    const LinearLayer &l = layer(m);
    multiply(numbers(l.weight), l.in, int64_t{1}, l.out, l.in, d(m), numbers(l.bias), d(m + 1));
    activate_in_place(l.latent, l.out, d(m + 1));
  }
}

template <class S> void Block<S>::reverse(double *losses) {
  const T *y = d(job.count);
  for (int64_t m = job.count - 1; m >= 0; --m) {
    const LinearLayer &l = layer(m);
    if (l.reversed) {
      multiply(numbers(l.weight), int64_t{1}, l.in, l.in, l.out, minus_bias(l, y), static_cast<const T *>(nullptr),
               a(m));
      activate_in_place(below(m), l.in, a(m));
      if (l.compare && losses)
        losses[m] += loss(l.in, d(m), a(m));
    }
    y = job.full ? a(m) : d(m);
  }
}

template <class S> void Block<S>::keep() {
  const int64_t outs = layer(job.count - 1).out;
  store_rows(d(job.count), n, outs, static_cast<S *>(job.out) + begin * outs);
  if (job.d)
    store_kept(d(1), n, job.kept_d, static_cast<S *>(job.d) + begin * job.kept_d);
  for (int64_t m = 0; job.a && m < job.count; ++m)
    if (layer(m).reversed)
      store_kept(a(m), n, layer(m).in, static_cast<S *>(job.a) + begin * job.kept_a + n * layer(m).kept_a);
}

// All d, and all a where the losses have a gradient: what was kept, the rest computed again.
template <class S> void Block<S>::recall(double *losses) {
  if (!job.d) {
    forward();
  } else {
    const LinearLayer &last = layer(job.count - 1);
    load_rows(static_cast<const S *>(job.x) + begin * layer(0).in, n, layer(0).in, d(0));
    load_kept(static_cast<const S *>(job.d) + begin * job.kept_d, n, job.kept_d, d(1));
    load_rows(static_cast<const S *>(job.out) + begin * last.out, n, last.out, d(job.count));
  }
  if (!job.twice)
    return;
  if (!job.a)
    return reverse(losses);
  for (int64_t m = 0; m < job.count; ++m)
    if (layer(m).reversed)
      load_kept(static_cast<const S *>(job.a) + begin * job.kept_a + n * layer(m).kept_a, n, layer(m).in, a(m));
}

// From the gradient of a_m in hand, if there is one, and the loss of layer m to the gradient of y.
template <class S> void Block<S>::through_reverse(int64_t m, const T *y, bool incoming) {
  const LinearLayer &l = layer(m);
  T *const g = work_[0];
  const T *const from = a(m), *const to = d(m);
  if (l.compare)
    each(l.in * kRows, [=, c = twice(l), more = static_cast<T>(incoming)](int64_t i) {
      const T before = more != 0 ? g[i] : static_cast<T>(0);
      g[i] = muladd(c, from[i] - to[i], before);
    });
  else if (!incoming)
    each(l.in * kRows, [=](int64_t i) { g[i] = 0; });
  clear_padding(g, n, l.in);
  differentiate_in_place(below(m), l.in, from, g);
  if (l.needs_weight)
    correlate(minus_bias(l, y), l.out, g, l.in, weight_sums(l));
  multiply(numbers(l.weight), l.in, int64_t{1}, l.out, l.in, g, static_cast<const T *>(nullptr), work_[1]);
  if (l.bias)
    add_rows(work_[1], l.out, static_cast<T>(-1), bias_sums(l));
  next_work();
}

// From the gradient of d_{m+1} to that of d_m, which the loss of layer m adds to.
template <class S> void Block<S>::through_forward(int64_t m, T *&g) {
  const LinearLayer &l = layer(m);
  differentiate_in_place(l.latent, l.out, d(m + 1), g);
  if (l.needs_weight)
    correlate(g, l.out, d(m), l.in, weight_sums(l));
  if (l.bias)
    add_rows(g, l.out, static_cast<T>(1), bias_sums(l));
  if (m == 0 && !job.grad_x)
    return;
  T *const next = work_[1];
  multiply(numbers(l.weight), int64_t{1}, l.in, l.in, l.out, g, static_cast<const T *>(nullptr), next);
  if (job.twice && l.compare)
    each(l.in * kRows,
         [=, c = twice(l), from = d(m), to = a(m)](int64_t i) { next[i] = muladd(c, from[i] - to[i], next[i]); });
  clear_padding(next, n, l.in);
  work_[1] = g, g = next;
}

template <class S> void Block<S>::backward() {
  const LinearLayer &last = layer(job.count - 1);
  T *&g = work_[3];
  if (job.grad_out)
    load_rows(static_cast<const S *>(job.grad_out) + begin * last.out, n, last.out, g);
  else
    each(last.out * kRows, [to = g](int64_t i) { to[i] = 0; });
  clear_padding(g, n, last.out);
  if (job.twice && job.full) {
    for (int64_t m = 0; m < job.count; ++m)
      through_reverse(m, m + 1 < job.count ? a(m + 1) : d(job.count), m > 0);
    each(last.out * kRows, [to = g, more = work_[0]](int64_t i) { to[i] += more[i]; });
  }
  for (int64_t m = job.count - 1; m >= 0; --m) {
    if (job.twice && !job.full && layer(m).reversed) {
      through_reverse(m, d(m + 1), false);
      each(layer(m).out * kRows, [to = g, more = work_[0]](int64_t i) { to[i] += more[i]; });
    }
    through_forward(m, g);
  }
  if (job.grad_x)
    store_rows(g, n, layer(0).in, static_cast<S *>(job.grad_x) + begin * layer(0).in);
}

template <class S> void Block<S>::drain(double *grads) const {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < job.params; ++i) {
    double total = 0;
    for (int64_t lane = 0; lane < lanes; ++lane)
      total += static_cast<double>(sums_[i * lanes + lane]);
    grads[i] = total;
  }
}

template <class S, class F> inline void each_block(const LinearChainJob &job, int64_t chunk, Block<S> &block, F f) {
  const int64_t begin = chunk * job.chunk_rows, end = begin + job.chunk_rows;
  for (int64_t row = begin; row < end && row < job.rows; row += kRows) {
    block.move_to(row);
    f();
  }
}

template <class S> void forward(const LinearChainJob &job, int64_t chunk, void *scratch) {
  Block<S> block(job, scratch, false);
  double *const losses = job.losses ? job.losses + chunk * job.count : nullptr;
  each_block(job, chunk, block, [&] {
    block.forward();
    if (losses)
      block.reverse(losses);
    block.keep();
  });
}

template <class S> void backward(const LinearChainJob &job, int64_t chunk, void *scratch) {
  Block<S> block(job, scratch, true);
  double *const losses = job.losses ? job.losses + chunk * job.count : nullptr;
  each_block(job, chunk, block, [&] {
    block.recall(losses);
    block.backward();
  });
  block.drain(job.grads + chunk * job.params);
}

template <class S> constexpr ChainKernels chain_kernels() { return {forward<S>, backward<S>}; }

} // namespace RACECAR_NAMESPACE

extern const ChainLevel RACECAR_CHAIN_LEVEL;
const ChainLevel RACECAR_CHAIN_LEVEL = {RACECAR_NAME,
                                        {RACECAR_NAMESPACE::chain_kernels<float>(),
                                         RACECAR_NAMESPACE::chain_kernels<double>(),
                                         RACECAR_NAMESPACE::chain_kernels<RACECAR_NAMESPACE::bf16>()}};

} // namespace racecar
