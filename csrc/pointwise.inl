// The kernels of the pointwise family, compiled by level.inl for each level of SIMD instructions. RACECAR_NAMESPACE is
// the level's own namespace, so that the linker never mixes the levels up; RACECAR_LEVEL names the table. For the same
// reason no header is included here, and nothing of the standard library is instantiated.
//
// A tile goes through a chain of short loops over rows in the first-level cache; main memory is read and written once.

namespace racecar {
namespace RACECAR_NAMESPACE {

#include "pointwise_math.inl"

#include "pointwise_rows.inl"

#include "pointwise_2x2.inl"

#include "pointwise_image.inl"

// a repeated from the windows of a tile to its full width.
template <class T> inline const T *undo_row(const Grid &g, const Tile &t, const T *a, T *into) {
  if (g.kw == 1)
    return a;
  each_tap(g, t, [=](int64_t small, int64_t full, int64_t) { into[full] = a[small]; });
  each_rest(g, t, [=](int64_t small, int64_t full) { into[full] = a[small]; });
  return into;
}

// The largest value of every window so far; NaN wins, as in PyTorch. Starts with the row 0 of the windows.
template <class T> inline void pool_row(const Grid &g, const Tile &t, int64_t r, const T *values, T *largest) {
  if (r == 0)
    each(t.windows * g.inner, [=](int64_t i) { largest[i] = -__builtin_inf(); });
  each_tap(g, t, [=](int64_t small, int64_t full, int64_t) { largest[small] = larger(values[full], largest[small]); });
}

// The same, with the number of the place in the window that holds it; the first one of several.
template <class T>
inline void find_row(const Grid &g, const Tile &t, int64_t r, const T *values, T *largest, T *place) {
  const int64_t kw = g.kw;
  if (r == 0)
    each(t.windows * g.inner, [=](int64_t i) {
      largest[i] = -__builtin_inf();
      place[i] = 0;
    });
  each_tap(g, t, [=](int64_t small, int64_t full, int64_t q) {
    const T v = values[full], most = largest[small];
    largest[small] = larger(v, most);
    place[small] = place_of_larger(v, most, static_cast<T>(r * kw + q), place[small]);
  });
}

// g + c2 · residual(i); without a residual g alone, without g the rest alone.
template <class S, class F, class T = typename Storage<S>::T>
inline const T *gather(const S *g, bool loss, T c2, int64_t n, T *into, F residual) {
  if (g)
    prefetch_behind(g, n);
  if (g && !loss)
    return load(g, n, into);
  if (g)
    each(n, [=](int64_t i) { into[i] = muladd(c2, residual(i), Storage<S>::load(g[i])); });
  else if (loss)
    each(n, [=](int64_t i) { into[i] = c2 * residual(i); });
  else
    each(n, [=](int64_t i) { into[i] = 0; });
  return into;
}

// Σ g of a row that begins at `first`, and with an affine Σ g·(x - mean), the gradient of its scale.
template <class S>
inline void sum_gradient(ChannelSums<S> &to, const Grid &g, int64_t outer, int64_t n, const S *own, Values<S> &of,
                         int64_t first) {
  using T = typename Storage<S>::T;
  using Pair = typename ChannelSums<S>::template Pair<T>;
  if (!to.wanted)
    return;
  if (!of.affine)
    return to.add(g, outer, n, [=](int64_t i) { return Pair{Storage<S>::load(own[i]), 0}; });
  const S *const x = of.from(first);
  if (!of.centred)
    return to.add(g, outer, n, [=](int64_t i) {
      const T value = Storage<S>::load(own[i]);
      return Pair{value, value * Storage<S>::load(x[i])};
    });
  to.add(g, outer, n, [=, mean = of.mean.at(g, outer)](int64_t i) {
    const T value = Storage<S>::load(own[i]);
    return Pair{value, value * (Storage<S>::load(x[i]) - mean[i])};
  });
}

template <class S> void sums(const Job &job, int64_t block, void *scratch) {
  using Store = Storage<S>;
  using T = typename Store::T;
  const Grid &g = job.grid;
  Arena arena{static_cast<char *>(scratch)};
  using Narrow = typename ChannelSums<S>::template Pair<T>;
  using Wide = typename ChannelSums<S>::template Pair<double>;
  Spread<T> origin(job.k[0], g, arena);
  ChannelSums<S> total(job, block, arena);
  each_tile(g, block, [&](const Tile &t) {
    const S *const x = static_cast<const S *>(job.d.x) + t.full;
    const int64_t n = t.columns * g.inner;
    if (!job.k[0])
      return total.add(g, t.outer, n, [=](int64_t i) { return Narrow{Store::load(x[i]), 0}; });
    const T *const k = origin.at(g, t.outer);
    total.add_wide(g, t.outer, n, [=](int64_t i) { // in double, since the origin may be far from the mean
      const double off = static_cast<double>(Store::load(x[i])) - static_cast<double>(k[i]);
      return Wide{off, off * off};
    });
  });
  total.finish(g);
}

template <class S> void materialise(const Job &job, int64_t block, void *scratch) {
  using Store = Storage<S>;
  using T = typename Store::T;
  const Grid &g = job.grid;
  Arena arena{static_cast<char *>(scratch)};
  Values<S> d(job.d, g, arena);
  Spread<T> minus(job.k[0], g, arena);
  Convolution<S> convolution(job, arena);
  T *const row = arena.take<T>(g.row), *const largest = arena.take<T>(g.row);
  each_tile(g, block, [&](const Tile &t) {
    convolution.compute(g, t, d);
    if (!job.out && Simple<S>::serves(d, g, t))
      return pool_2x2(g, t, d, static_cast<S *>(job.out_pooled) + t.small);
    const int64_t n = t.columns * g.inner;
    for (int64_t r = 0; r < (job.out ? t.rows : g.kh); ++r) {
      const int64_t first = t.full + r * g.width * g.inner;
      S *const out = job.out ? static_cast<S *>(job.out) + first : nullptr;
      T *const into = out ? target(out, row) : row;
      const T *const values = d.row(g, t.outer, first, n, into);
      if (job.out_pooled && r < g.kh)
        pool_row(g, t, r, values, largest);
      if (out && job.k[0])
        each(n, [=, off = minus.at(g, t.outer)](int64_t i) { out[i] = Store::store(values[i] - off[i]); });
      else if (out && (into == row || values != into))
        each(n, [=](int64_t i) { out[i] = Store::store(values[i]); });
    }
    if (job.out_pooled)
      each(t.windows * g.inner,
           [=, out = static_cast<S *>(job.out_pooled) + t.small](int64_t i) { out[i] = Store::store(largest[i]); });
  });
}

// Σ off² of rows: a few of them on top of each other before they are summed in double.
template <class T> struct Squares {
  static constexpr int few = 16;
  T *const row;
  const int64_t n;
  double total = 0;
  int rows = 0;

  Squares(const Grid &g, Arena &arena) : row(arena.take<T>(g.row)), n(g.row) {
    each(n, [to = row](int64_t i) { to[i] = 0; });
  }

  // After n more numbers on top of each other.
  void next(int n) {
    if ((rows += n) < few)
      return;
    drain();
    rows = 0;
  }

  double drain() {
    double sum = 0;
    T *const from = row;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i)
      sum += static_cast<double>(from[i]);
    each(n, [=](int64_t i) { from[i] = 0; });
    return total += sum;
  }
};

template <class S> void sum_of_squares(const Job &job, int64_t block, void *scratch) {
  using Store = Storage<S>;
  using T = typename Store::T;
  const Grid &g = job.grid;
  Arena arena{static_cast<char *>(scratch)};
  Values<S> d(job.d, g, arena), a(job.a, g, arena);
  Spread<T> minus(job.k[0], g, arena);
  T *const d_row = arena.take<T>(g.row), *const a_row = arena.take<T>(g.row), *const wide = arena.take<T>(g.row);
  Convolution<S> convolution(job, arena);
  Squares<T> squares(g, arena);
  each_tile(g, block, [&](const Tile &t) {
    convolution.compute(g, t, d);
    const int64_t n = t.columns * g.inner;
    const int64_t few = t.windows * g.inner;
    prefetch_behind(a.x + t.small, few);
    const T *const small = a.row(g, t.outer, t.small, few, a_row);
    if (Simple<S>::serves(d, g, t)) {
      residual_2x2<S, T>(g, t, d, small, nullptr, squares.row);
      squares.next(4);
    } else {
      const T *const undone = undo_row(g, t, small, wide);
      for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t first = t.full + r * g.width * g.inner;
        prefetch_behind(d.from(first), n);
        const T *const values = d.row(g, t.outer, first, n, d_row);
        each(n, [=, to = squares.row](int64_t i) {
          const T off = values[i] - undone[i];
          to[i] = muladd(off, off, to[i]);
        });
        squares.next(1);
      }
    }
    if (!job.out)
      return;
    S *const out = static_cast<S *>(job.out) + t.small;
    if (job.k[0])
      each(few, [=, off = minus.at(g, t.outer)](int64_t i) { out[i] = Store::store(small[i] - off[i]); });
    else
      each(few, [=](int64_t i) { out[i] = Store::store(small[i]); });
  });
  job.squares[block] = squares.drain();
}

// Σ over every window of (undo(a) - d), from all rows of a tile; their squares too, where those are wanted.
template <class S, class T = typename Storage<S>::T>
inline const T *window_residual(const Grid &g, const Tile &t, Values<S> &d, const T *a, T *d_row, T *wide, T *column,
                                T *into, Squares<T> *squares) {
  if (Simple<S>::serves(d, g, t)) {
    residual_2x2<S, T>(g, t, d, a, into, squares ? squares->row : nullptr);
    if (squares)
      squares->next(4);
    return into;
  }
  const int64_t n = t.columns * g.inner;
  const T *const undone = undo_row(g, t, a, wide);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t first = t.full + r * g.width * g.inner;
    prefetch_behind(d.from(first), n);
    const T *const values = d.row(g, t.outer, first, n, d_row);
    if (r == 0)
      each(n, [=](int64_t i) { column[i] = undone[i] - values[i]; });
    else
      each(n, [=](int64_t i) { column[i] += undone[i] - values[i]; });
    if (!squares)
      continue;
    each(n, [=, to = squares->row](int64_t i) {
      const T off = values[i] - undone[i];
      to[i] = muladd(off, off, to[i]);
    });
    squares->next(1);
  }
  if (g.kw == 1)
    return column;
  each(t.windows * g.inner, [=](int64_t i) { into[i] = 0; });
  each_tap(g, t, [=](int64_t small, int64_t full, int64_t) { into[small] += column[full]; });
  each_rest(g, t, [=](int64_t small, int64_t full) { into[small] += column[full]; });
  return into;
}

template <class S> void grad_reverse(const Job &job, int64_t block, void *scratch) {
  using Store = Storage<S>;
  using T = typename Store::T;
  const Grid &g = job.grid;
  Arena arena{static_cast<char *>(scratch)};
  Values<S> d(job.d, g, arena), a(job.a, g, arena);
  ChannelSums<S> total(job, block, arena);
  T *const d_row = arena.take<T>(g.row), *const a_row = arena.take<T>(g.row), *const wide = arena.take<T>(g.row),
           *const column = arena.take<T>(g.row), *const window = arena.take<T>(g.row);
  Convolution<S> convolution(job, arena);
  Squares<T> squares(g, arena);
  each_tile(g, block, [&](const Tile &t) {
    convolution.compute(g, t, d);
    const int64_t n = t.windows * g.inner;
    prefetch_behind(a.x + t.small, n);
    const T *const values = a.row(g, t.outer, t.small, n, a_row);
    const T *const residual =
        job.loss ? window_residual(g, t, d, values, d_row, wide, column, window, job.squares ? &squares : nullptr)
                 : nullptr;
    const T c2 = static_cast<T>(job.c2);
    const S *const incoming = job.g ? static_cast<const S *>(job.g) + t.small : nullptr;
    S *const out = static_cast<S *>(job.out) + t.small;
    const T *const sum = gather(incoming, job.loss, c2, n, window, [=](int64_t i) { return residual[i]; });
    a.differentiate_row(sum, values, n, out);
    sum_gradient(total, g, t.outer, n, out, a, t.small);
  });
  total.finish(g);
  if (job.squares)
    job.squares[block] = squares.drain();
}

template <class S> void grad_forward(const Job &job, int64_t block, void *scratch) {
  using Store = Storage<S>;
  using T = typename Store::T;
  const Grid &g = job.grid;
  Arena arena{static_cast<char *>(scratch)};
  Values<S> d(job.d, g, arena), a(job.a, g, arena);
  ChannelSums<S> total(job, block, arena);
  Convolution<S> convolution(job, arena);
  WeightSums<S> weight(job, block, arena);
  const int64_t below = g.width * g.inner, next = weight.wanted() ? g.row : below; // from one row to the next: x, out
  T *const a_row = arena.take<T>(g.row), *const wide = arena.take<T>(g.row), *const largest = arena.take<T>(g.row),
           *const place = arena.take<T>(g.row), *const from = arena.take<T>(g.row), *const sum = arena.take<T>(g.row),
           *const rows = arena.take<T>(g.rows * g.row);
  const T **const values = arena.take<const T *>(g.rows);
  each_tile(g, block, [&](const Tile &t) {
    convolution.compute(g, t, d);
    const int64_t n = t.columns * g.inner, few = t.windows * g.inner;
    S *const out = weight.wanted() ? weight.rows : static_cast<S *>(job.out) + t.full;
    if (job.pooled && Simple<S>::serves(d, g, t)) {
      const T *const small = job.loss ? a.row(g, t.outer, t.small, few, a_row) : nullptr;
      const S *const full = job.g ? static_cast<const S *>(job.g) + t.full : nullptr;
      grad_forward_2x2<S>(g, t, d, small, static_cast<T>(job.c2),
                          load(static_cast<const S *>(job.pooled) + t.small, few, from), full, out, next, total);
      for (int64_t r = 0; r < t.rows && weight.wanted(); ++r)
        weight.add(out + r * next, t.full + r * below, n);
      return;
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t first = t.full + r * below;
      prefetch_behind(d.from(first), n);
      values[r] = d.row(g, t.outer, first, n, rows + r * g.row);
      if (job.pooled && r < g.kh)
        find_row(g, t, r, values[r], largest, place);
    }
    const T *undone = nullptr, *pooled = nullptr;
    if (job.loss) {
      prefetch_behind(a.x + t.small, few);
      undone = undo_row(g, t, a.row(g, t.outer, t.small, few, a_row), wide);
    }
    if (job.pooled)
      pooled = load(static_cast<const S *>(job.pooled) + t.small, few, from);
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t first = t.full + r * below;
      const S *const incoming = job.g ? static_cast<const S *>(job.g) + first : nullptr;
      const T *gathered = gather(incoming, job.loss, static_cast<T>(job.c2), n, sum,
                                 [=, own = values[r]](int64_t i) { return own[i] - undone[i]; });
      if (pooled && r < g.kh) {
        const T *const before = gathered;
        if (before != sum)
          each(n, [=](int64_t i) { sum[i] = before[i]; });
        each_tap(g, t, [=, tap = r * g.kw](int64_t small, int64_t full, int64_t q) {
          sum[full] += place[small] == static_cast<T>(tap + q) ? pooled[small] : static_cast<T>(0);
        });
        gathered = sum;
      }
      d.differentiate_row(gathered, values[r], n, out + r * next);
      sum_gradient(total, g, t.outer, n, out + r * next, d, first);
      if (weight.wanted())
        weight.add(out + r * next, first, n);
    }
  });
  total.finish(g);
  weight.finish();
}

template <class S> void combine(const Job &job, int64_t block, void *scratch) {
  using Store = Storage<S>;
  using T = typename Store::T;
  const Grid &g = job.grid;
  Arena arena{static_cast<char *>(scratch)};
  Spread<T> k0(job.k[0], g, arena), k1(job.k[1], g, arena), k2(job.k[2], g, arena), k3(job.k[3], g, arena);
  each_tile(g, block, [&](const Tile &t) {
    const T *const by = k0.at(g, t.outer), *const by_x = k1.at(g, t.outer), *const plus = k2.at(g, t.outer),
                   *const mean = k3.at(g, t.outer);
    const S *const x = static_cast<const S *>(job.d.x) + t.full, *const from = static_cast<const S *>(job.g) + t.full;
    each(t.columns * g.inner, [=, out = static_cast<S *>(job.out) + t.full](int64_t i) {
      const T off = Store::load(x[i]) - mean[i];
      out[i] = Store::store(muladd(by[i], Store::load(from[i]), muladd(by_x[i], off, plus[i])));
    });
  });
}

template <class S> constexpr Kernels kernels() {
  return {sums<S>, materialise<S>, sum_of_squares<S>, grad_reverse<S>, grad_forward<S>, combine<S>};
}

} // namespace RACECAR_NAMESPACE

extern const Level RACECAR_LEVEL;
const Level RACECAR_LEVEL = {RACECAR_NAME,
                             {RACECAR_NAMESPACE::kernels<float>(), RACECAR_NAMESPACE::kernels<double>(),
                              RACECAR_NAMESPACE::kernels<RACECAR_NAMESPACE::bf16>()}};

} // namespace racecar
