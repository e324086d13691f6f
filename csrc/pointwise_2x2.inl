// The kernels' short way where most pooling is: windows of 2 x 2 that divide the image, channels beside each other, and
// an activation that costs next to nothing. A window's four values stay in registers, so that main memory is what is
// waited for. Every function works on one tile and gives what the long way gives. Included by pointwise.inl.

template <bool value> struct Flag {
  static constexpr bool on = value;
};

template <class F> RACECAR_INLINE void with_flag(bool on, F f) {
  if (on)
    f(Flag<true>{});
  else
    f(Flag<false>{});
}

// How d is read: with an affine or without, through a clamp or as it is. A clamp that is done may be done again.
template <class S> struct Simple {
  using T = typename Storage<S>::T;
  const S *x;
  const T *by, *plus;
  Params<T> p;

  Simple(Values<S> &d, const Grid &g, const Tile &t)
      : x(d.from(t.full)), by(d.affine ? d.scale.at(g, t.outer) : nullptr),
        plus(d.affine ? d.shift.at(g, t.outer) : nullptr), p(d.p) {}

  static bool serves(const Values<S> &d, const Grid &g, const Tile &t) {
    return g.kh == 2 && g.kw == 2 && g.inner >= 8 && t.rows == 2 && t.columns == 2 * t.windows &&
           (d.act == Act::identity || d.act == Act::clamp);
  }

  template <bool affine, Act act> RACECAR_INLINE T at(int64_t i, int64_t j) const {
    using Store = Storage<S>;
    T u = Store::load(x[i]);
    if constexpr (affine)
      u = muladd(u, by[j], plus[j]);
    if constexpr (affine || act != Act::identity)
      u = Store::load(Store::store(activate<act>(u, p)));
    return u;
  }
};

// Calls f(tag of the activation, flag of the affine).
template <class S, class F> RACECAR_INLINE void with_simple(const Values<S> &d, F f) {
  with_flag(d.affine, [&](auto affine) {
    if (d.act == Act::clamp)
      f(Tag<Act::clamp>{}, affine);
    else
      f(Tag<Act::identity>{}, affine);
  });
}

// Calls f(index in a pooled row, index of the window's first value, channel).
template <class F> RACECAR_INLINE void each_window(const Grid &g, const Tile &t, F f) {
  const int64_t inner = g.inner;
  for (int64_t x = 0; x < t.windows * inner; x += inner)
    each(inner, [=](int64_t j) { f(x + j, 2 * x + j, j); });
}

template <class S> inline void pool_2x2(const Grid &g, const Tile &t, Values<S> &d, S *out) {
  using Store = Storage<S>;
  using T = typename Store::T;
  const Simple<S> from(d, g, t);
  const int64_t right = g.inner, down = g.width * g.inner;
  prefetch_behind(from.x, t.columns * g.inner);
  prefetch_behind(from.x + down, t.columns * g.inner);
  with_simple(d, [=](auto tag, auto affine) {
    constexpr Act act = decltype(tag)::act;
    constexpr bool has = decltype(affine)::on;
    each_window(g, t, [=](int64_t small, int64_t full, int64_t j) {
      T most = from.template at<has, act>(full, j);
      const int64_t at[3] = {full + right, full + down, full + down + right};
      for (int q = 0; q < 3; ++q) {
        most = larger(from.template at<has, act>(at[q], j), most);
      }
      out[small] = Store::store(most);
    });
  });
}

// Σ over the window of (a - d) into `into`, the squares on top of `squares`; either may be null.
template <class S, class T = typename Storage<S>::T>
inline void residual_2x2(const Grid &g, const Tile &t, Values<S> &d, const T *a, T *into, T *squares) {
  const Simple<S> from(d, g, t);
  const int64_t right = g.inner, down = g.width * g.inner;
  prefetch_behind(from.x, t.columns * g.inner);
  prefetch_behind(from.x + down, t.columns * g.inner);
  with_simple(d, [=](auto tag, auto affine) {
    constexpr Act act = decltype(tag)::act;
    constexpr bool has = decltype(affine)::on;
    with_flag(into != nullptr, [=](auto sums) {
      with_flag(squares != nullptr, [=](auto squared) {
        each_window(g, t, [=](int64_t small, int64_t full, int64_t j) {
          T sum = 0, square = 0;
          const T own = a[small];
          const int64_t at[4] = {full, full + down, full + right, full + down + right};
          for (int q = 0; q < 4; ++q) {
            const T off = own - from.template at<has, act>(at[q], j);
            sum += off;
            square = muladd(off, off, square);
          }
          if constexpr (decltype(sums)::on)
            into[small] = sum;
          if constexpr (decltype(squared)::on)
            squares[small] += square;
        });
      });
    });
  });
}

// act'(d) · (unpool(pooled) + full + c2 · (d - a)); full and a may be null. `next` leads from one row of `out` to the
// other. Adds the sums per channel.
template <class S, class T = typename Storage<S>::T>
inline void grad_forward_2x2(const Grid &g, const Tile &t, Values<S> &d, const T *a, T c2, const T *pooled,
                             const S *full_g, S *out, int64_t next, ChannelSums<S> &total) {
  using Store = Storage<S>;
  const Simple<S> from(d, g, t);
  const int64_t right = g.inner, down = g.width * g.inner;
  const T *const mean = d.centred ? d.mean.at(g, t.outer) : nullptr;
  prefetch_behind(from.x, t.columns * g.inner);
  prefetch_behind(from.x + down, t.columns * g.inner);
  const auto sums = total.wanted ? total.narrow : decltype(total.narrow){};
  with_simple(d, [=](auto tag, auto affine) {
    constexpr Act act = decltype(tag)::act;
    constexpr bool has = decltype(affine)::on;
    with_flag(a != nullptr, [=](auto loss) {
      with_flag(full_g != nullptr, [=](auto incoming) {
        with_flag(sums.first != nullptr, [=](auto summed) {
          each_window(g, t, [=](int64_t small, int64_t full, int64_t j) {
            const int64_t at[4] = {full, full + right, full + down, full + down + right};
            T v[4];
            for (int q = 0; q < 4; ++q)
              v[q] = from.template at<has, act>(at[q], j);
            T most = v[0], place = 0;
            for (int q = 1; q < 4; ++q) {
              place = place_of_larger(v[q], most, static_cast<T>(q), place);
              most = larger(v[q], most);
            }
            const int64_t to[4] = {full, full + right, full + next, full + next + right};
            T sum = 0, with_x = 0;
            for (int q = 0; q < 4; ++q) {
              T grad = place == static_cast<T>(q) ? pooled[small] : static_cast<T>(0);
              if constexpr (decltype(incoming)::on)
                grad += Store::load(full_g[at[q]]);
              if constexpr (decltype(loss)::on)
                grad = muladd(c2, v[q] - a[small], grad);
              const T own = differentiate<act>(grad, v[q], from.p);
              out[to[q]] = Store::store(own); // not through a name of its own: GCC would copy it as a whole, one by one
              if constexpr (decltype(summed)::on) {
                const T rounded = Store::load(Store::store(own));
                sum += rounded;
                if constexpr (has) // without a scale nobody asks for its gradient
                  with_x += rounded * (Store::load(from.x[at[q]]) - (mean ? mean[j] : static_cast<T>(0)));
              }
            }
            if constexpr (decltype(summed)::on) {
              sums.first[small] += sum;
              if constexpr (has)
                sums.second[small] += with_x;
            }
          });
        });
      });
    });
  });
  if (total.wanted)
    total.next_rows(g, 4);
}
