// Tiles and their rows: what the kernels of pointwise.inl are made of. Every function is a loop over a row that stays
// in the first-level cache. Included by pointwise.inl, inside the namespace of a level.

// Calls f(0 .. n-1); f may read and write what belongs to its own index, in place too.
template <class F> RACECAR_INLINE void each(int64_t n, F f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    f(i);
}

// Hands out pieces of a kernel's scratch memory.
struct Arena {
  char *next;

  template <class V> V *take(int64_t n) {
    next += (64 - (bit_cast<uintptr_t>(next) & 63)) & 63;
    V *piece = bit_cast<V *>(next);
    next += n * static_cast<int64_t>(sizeof(V));
    return piece;
  }
};

struct Tile {
  int64_t outer, rows, columns, windows; // windows side by side cover the columns, the last one with the rest
  int64_t full, small;                   // its first element at full and at pooled size
};

inline Tile tile_at(const Grid &g, int64_t i) {
  const int64_t x = i % g.tiles * g.columns, y = i / g.tiles % g.h, outer = i / g.tiles / g.h;
  const bool right = x + g.columns >= g.w, bottom = y + 1 == g.h;
  Tile t;
  t.outer = outer;
  t.rows = bottom ? g.height - y * g.kh : g.kh;
  t.windows = right ? g.w - x : g.columns;
  t.columns = right ? g.width - x * g.kw : g.columns * g.kw;
  t.full = ((outer * g.height + y * g.kh) * g.width + x * g.kw) * g.inner;
  t.small = ((outer * g.h + y) * g.w + x) * g.inner;
  return t;
}

template <class F> inline void each_tile(const Grid &g, int64_t block, F f) {
  const int64_t all = g.outer * g.h * g.tiles, first = block * g.per_block;
  for (int64_t i = first; i < all && i < first + g.per_block; ++i)
    f(tile_at(g, i));
}

// Asks for what lies behind n elements while those are worked on: where several tensors are read, their rows are too
// short for the processor to see it coming. Row by row, since many requests at once make it wait.
template <class S> inline void prefetch_behind(const S *x, int64_t n) {
  const char *const from = bit_cast<const char *>(x + n);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(S)); i += 64)
    __builtin_prefetch(from + i, 0, 2);
}

// Calls f(index in a pooled row, index in a full row, column in the window) for the columns that windows cover whole.
template <class F> RACECAR_INLINE void each_tap(const Grid &g, const Tile &t, F f) {
  const int64_t inner = g.inner, kw = g.kw;
  if (inner > 1 && kw == 2)
    for (int64_t x = 0; x < t.windows * inner; x += inner)
      each(inner, [=](int64_t j) {
        f(x + j, 2 * x + j, 0);
        f(x + j, 2 * x + inner + j, 1);
      });
  else if (inner > 1)
    for (int64_t x = 0; x < t.windows; ++x)
      for (int64_t q = 0; q < kw; ++q)
        each(inner, [=](int64_t j) { f(x * inner + j, (x * kw + q) * inner + j, q); });
  else if (kw == 1)
    each(t.windows, [=](int64_t x) { f(x, x, 0); });
  else if (kw == 2)
    each(t.windows, [=](int64_t x) {
      f(x, 2 * x, 0);
      f(x, 2 * x + 1, 1);
    });
  else
    for (int64_t q = 0; q < kw; ++q)
      each(t.windows, [=](int64_t x) { f(x, x * kw + q, q); });
}

// The same for the columns that no window covers: they belong to the last one.
template <class F> RACECAR_INLINE void each_rest(const Grid &g, const Tile &t, F f) {
  const int64_t inner = g.inner, last = (t.windows - 1) * inner;
  for (int64_t x = t.windows * g.kw; x < t.columns; ++x)
    each(inner, [=](int64_t j) { f(last + j, x * inner + j); });
}

// Values per channel, repeated as the elements of a row need them.
template <class T> struct Spread {
  const T *of; // null: ones
  T *row;
  int64_t channel = -1;

  Spread(const void *values, const Grid &g, Arena &arena)
      : of(static_cast<const T *>(values)), row(arena.take<T>(g.row)) {}

  const T *at(const Grid &g, int64_t outer) {
    const int64_t c = g.inner > 1 ? 0 : outer % g.channels;
    if (c == channel)
      return row;
    channel = c;
    T *const to = row;
    const T *const from = of;
    if (!from)
      each(g.row, [=](int64_t i) { to[i] = 1; });
    else if (g.inner > 1)
      for (int64_t x = 0; x < g.row; x += g.inner)
        each(g.inner, [=](int64_t j) { to[x + j] = from[j]; });
    else
      each(g.row, [=, value = from[c]](int64_t i) { to[i] = value; });
    return row;
  }
};

// The elements of a tensor in the type that is computed in: converted into `into`, or where they are.
inline const float *load(const float *x, int64_t, float *) { return x; }
inline const double *load(const double *x, int64_t, double *) { return x; }
inline const float *load(const bf16 *x, int64_t n, float *into) {
  each(n, [=](int64_t i) { into[i] = Storage<bf16>::load(x[i]); });
  return into;
}

// Where a row can be computed in place of the result, which is in the type that is computed in, or in `row`.
RACECAR_INLINE float *target(float *out, float *) { return out; }
RACECAR_INLINE double *target(double *out, double *) { return out; }
RACECAR_INLINE float *target(bf16 *, float *row) { return row; }

// Rows of act(x * scale + shift).
template <class S> struct Values {
  using T = typename Storage<S>::T;
  const S *x;
  int64_t begin = 0; // the element that x points to
  bool affine, done, centred;
  Act act;
  Params<T> p;
  Spread<T> scale, shift, mean;

  Values(const Lazy &lazy, const Grid &g, Arena &arena)
      : x(static_cast<const S *>(lazy.x)), affine(lazy.shift != nullptr), done(lazy.done),
        centred(lazy.mean != nullptr), act(lazy.act), p(rounded<S>(lazy.act, lazy.p)), scale(lazy.scale, g, arena),
        shift(lazy.shift, g, arena), mean(lazy.mean, g, arena) {}

  const S *from(int64_t first) const { return x + (first - begin); }

  // n elements from `first` on: in `into`, or where they are if there is nothing to compute.
  const T *row(const Grid &g, int64_t outer, int64_t first, int64_t n, T *into) {
    using Store = Storage<S>;
    const S *const from = this->from(first);
    if (done || (!affine && act == Act::identity))
      return load(from, n, into);
    const T *const by = affine ? scale.at(g, outer) : nullptr, *const plus = affine ? shift.at(g, outer) : nullptr;
    with_constant(act, [=, p = p, affine = affine](auto tag) {
      constexpr Act kind = decltype(tag)::act;
      if (affine)
        each(n, [=](int64_t i) {
          const T u = muladd(Store::load(from[i]), by[i], plus[i]);
          into[i] = Store::load(Store::store(activate<kind>(u, p)));
        });
      else
        each(n, [=](int64_t i) { into[i] = Store::load(Store::store(activate<kind>(Store::load(from[i]), p))); });
    });
    return into;
  }

  // out = g · act'(·), from the values of a row. out may be where g is.
  void differentiate_row(const T *g, const T *value, int64_t n, S *out) const {
    with_constant(act, [=, p = p](auto tag) {
      constexpr Act kind = decltype(tag)::act;
      each(n, [=](int64_t i) { out[i] = Storage<S>::store(differentiate<kind>(g[i], value[i], p)); });
    });
  }
};

// Two sums per channel of a block. Channels beside each other are summed where they are in the row: a few rows on top
// of each other in the type that is computed in, the rest in double. Without job.partials nothing is summed.
template <class S> struct ChannelSums {
  using T = typename Storage<S>::T;
  static constexpr int few = 16;

  template <class N> struct Pair {
    N first, second;
  };
  template <class N> struct Rows {
    N *first, *second;
  };

  bool wanted;
  int rows = 0; // in `narrow`
  Rows<T> narrow{};
  Rows<double> wide{}, sums{};

  ChannelSums(const Job &job, int64_t block, Arena &arena) : wanted(job.partials != nullptr) {
    const Grid &g = job.grid;
    if (!wanted)
      return;
    narrow = {arena.take<T>(g.row), arena.take<T>(g.row)};
    wide = {arena.take<double>(g.row), arena.take<double>(g.row)};
    double *const first = job.partials + block * 2 * g.channels;
    sums = {first, first + g.channels};
    clear(narrow, g.row);
    clear(wide, g.row);
    clear(sums, g.channels);
  }

  template <class N> static void clear(Rows<N> rows, int64_t n) {
    each(n, [=](int64_t i) { rows.first[i] = rows.second[i] = 0; });
  }

  template <class N, class F> static void add_row(Rows<N> to, int64_t n, F pair) {
    each(n, [=](int64_t i) {
      const auto both = pair(i);
      to.first[i] += both.first;
      to.second[i] += both.second;
    });
  }

  // pair(i) gives the two numbers for element i of a row, in T.
  template <class F> void add(const Grid &g, int64_t outer, int64_t n, F pair) {
    if (g.inner == 1)
      return add_wide(g, outer, n, pair);
    add_row(narrow, n, pair);
    next_rows(g, 1);
  }

  // After n more numbers on top of each other.
  void next_rows(const Grid &g, int n) {
    if ((rows += n) >= few)
      flush(g);
  }

  // The same, all in double.
  template <class F> void add_wide(const Grid &g, int64_t outer, int64_t n, F pair) {
    if (g.inner > 1)
      return add_row(wide, n, pair);
    double a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t i = 0; i < n; ++i) {
      const auto both = pair(i);
      a += static_cast<double>(both.first);
      b += static_cast<double>(both.second);
    }
    sums.first[outer % g.channels] += a;
    sums.second[outer % g.channels] += b;
  }

  void flush(const Grid &g) {
    add_row(wide, g.row, [from = narrow](int64_t i) {
      return Pair<double>{static_cast<double>(from.first[i]), static_cast<double>(from.second[i])};
    });
    clear(narrow, g.row);
    rows = 0;
  }

  void finish(const Grid &g) {
    if (!wanted || g.inner == 1)
      return;
    flush(g);
    for (int64_t x = 0; x < g.row; x += g.inner)
      add_row(sums, g.inner,
              [=, from = wide](int64_t j) { return Pair<double>{from.first[x + j], from.second[x + j]}; });
  }
};
