// The convolution of an image of few channels, forth and back, beside the pointwise work on its result c: c is computed
// anew wherever a kernel reads it, a tile at a time, and ∂/∂c goes into the gradient of the weight from rows that are
// still in the first-level cache. Neither is ever written. Included by pointwise.inl, inside the namespace of a level.

// RACECAR_VECTOR bytes in one register.
template <class T> struct Vector;
template <> struct Vector<float> {
  typedef float type __attribute__((vector_size(RACECAR_VECTOR)));
};
template <> struct Vector<double> {
  typedef double type __attribute__((vector_size(RACECAR_VECTOR)));
};

template <class T> RACECAR_INLINE typename Vector<T>::type load_vector(const T *from) {
  typename Vector<T>::type v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class T> RACECAR_INLINE void store_vector(T *to, typename Vector<T>::type v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// Where pixels of c side by side read the image.
template <class S> struct Patch {
  using T = typename Storage<S>::T;
  const Image &image;
  const bool wanted;
  const int64_t inner, all; // channels of c; weights of each
  int64_t *const at;        // where every weight begins to read

  Patch(const Job &job, Arena &arena, bool wanted)
      : image(job.image), wanted(wanted), inner(job.grid.inner), all(wanted ? image.weights / inner : 0),
        at(take<int64_t>(arena, all)) {
    const int64_t across = image.kernel[1] * image.channels;
    for (int64_t w = 0; w < all; ++w)
      at[w] = (w / across * image.dilation[0] * image.width + w % across / image.channels * image.dilation[1]) *
                  image.channels +
              w % image.channels;
  }

  int64_t step() const { return image.stride[1] * image.channels; } // from one pixel to the next

  template <class X> X *take(Arena &arena, int64_t n) const { return wanted ? arena.take<X>(n) : nullptr; }

  // Calls f(image, number of pixels, element of the row) for every part of n elements of c from `first` on that lies in
  // one row of one image.
  template <class F> void each_run(int64_t first, int64_t n, F f) const {
    for (int64_t pixel = first / inner, left = n / inner, done = 0; left > 0;) {
      const int64_t x = pixel % image.columns, y = pixel / image.columns % image.rows;
      const int64_t some = left < image.columns - x ? left : image.columns - x;
      const int64_t row = pixel / image.columns / image.rows * image.height + y * image.stride[0];
      f(static_cast<const T *>(image.x) + (row * image.width + x * image.stride[1]) * image.channels, some, done);
      pixel += some, left -= some, done += some * inner;
    }
  }
};

// c[q] = bias + Σ_t W[t] x[stride·q + dilation·t], a tile at a time, where d is to be read of it.
template <class S> struct Convolution {
  using T = typename Storage<S>::T;
  using V = typename Vector<T>::type;
  static constexpr int64_t lanes = RACECAR_VECTOR / static_cast<int64_t>(sizeof(T));

  Patch<S> patch;
  const T *const weight, *const bias; // [weights][channels of c]; null: none
  T *const row;
  S *const tile; // its rows as far from each other as those of c

  Convolution(const Job &job, Arena &arena)
      : patch(job, arena, job.image.weight != nullptr), weight(static_cast<const T *>(job.image.weight)),
        bias(static_cast<const T *>(job.image.bias)), row(patch.template take<T>(arena, job.grid.row)),
        tile(patch.template take<S>(arena, job.grid.apart)) {}

  // Without an image d stays what it is.
  void compute(const Grid &g, const Tile &t, Values<S> &d) {
    if (!patch.wanted)
      return;
    for (int64_t r = 0; r < t.rows; ++r)
      write(tile + r * g.width * g.inner, t.full + r * g.width * g.inner, t.columns * g.inner);
    d.x = tile;
    d.begin = t.full;
  }

private:
  // n elements of c from `first` on.
  void write(S *to, int64_t first, int64_t n) {
    T *const into = target(to, row);
    patch.each_run(first, n, [&](const T *x, int64_t count, int64_t done) {
      int64_t q = 0;
      for (; q + 8 <= count; q += 8)
        add_pixels<8>(x + q * patch.step(), into + done + q * patch.inner);
      for (; q + 2 <= count; q += 2)
        add_pixels<2>(x + q * patch.step(), into + done + q * patch.inner);
      for (; q < count; ++q)
        add_pixels<1>(x + q * patch.step(), into + done + q * patch.inner);
    });
    if (into == row)
      each(n, [=, from = row](int64_t i) { to[i] = Storage<S>::store(from[i]); });
  }

  template <int some> RACECAR_INLINE void add_pixels(const T *x, T *to) const {
    const int64_t step = patch.step(), inner = patch.inner, all = patch.all;
    int64_t c = 0;
    for (; c + lanes <= inner; c += lanes) {
      V sum[some];
      for (int u = 0; u < some; ++u)
        sum[u] = bias ? load_vector(bias + c) : V{};
      for (int64_t w = 0; w < all; ++w) {
        const V own = load_vector(weight + w * inner + c);
        for (int u = 0; u < some; ++u)
          sum[u] += own * x[patch.at[w] + u * step];
      }
      for (int u = 0; u < some; ++u)
        store_vector(to + u * inner + c, sum[u]);
    }
    for (; c < inner; ++c)
      for (int u = 0; u < some; ++u) {
        T sum = bias ? bias[c] : static_cast<T>(0);
        for (int64_t w = 0; w < all; ++w)
          sum = muladd(weight[w * inner + c], x[patch.at[w] + u * step], sum);
        to[u * inner + c] = sum;
      }
  }
};

// ∂/∂W[t, k, c] = Σ_q x[k, stride·q + dilation·t] · g[c, q], for the pixels q of a block.
template <class S> struct WeightSums {
  using T = typename Storage<S>::T;
  using V = typename Vector<T>::type;
  static constexpr int64_t lanes = RACECAR_VECTOR / static_cast<int64_t>(sizeof(T));
  static constexpr int few = 256; // pixels that are summed in the type that is computed in, before they go to double
  static constexpr int most = 9;  // sums that stay in registers, of one vector each

  Patch<S> patch;
  const int64_t inner, weights, each_time; // how many weights of a channel are summed at a time
  T *const narrow;
  double *const sums;
  S *const rows; // of ∂/∂c, for those of a tile
  T *const row;  // one of them, in the type that is computed in
  int64_t pixels = 0;

  WeightSums(const Job &job, int64_t block, Arena &arena)
      : patch(job, arena, job.image.gradients != nullptr), inner(patch.inner), weights(job.image.weights),
        each_time(wanted() ? (patch.all - 1) / ((patch.all - 1) / most + 1) + 1 : 0),
        narrow(patch.template take<T>(arena, weights)),
        sums(wanted() ? job.image.gradients + block * weights : nullptr),
        rows(patch.template take<S>(arena, job.grid.rows * job.grid.row)),
        row(patch.template take<T>(arena, job.grid.row)) {
    if (wanted())
      each(weights, [to = narrow, sums = sums](int64_t i) { to[i] = 0, sums[i] = 0; });
  }

  bool wanted() const { return patch.wanted; }

  // Takes a row of ∂/∂c: n elements, the first of them belongs to element `first` of c.
  void add(const S *given, int64_t first, int64_t n) {
    const T *const g = load(given, n, row);
    patch.each_run(first, n, [&](const T *x, int64_t count, int64_t done) { add_run(x, count, g + done); });
    if ((pixels += n / inner) >= few)
      drain();
  }

  void finish() {
    if (wanted())
      drain();
  }

private:
  // Every weight's sum over pixels side by side.
  void add_run(const T *x, int64_t count, const T *g) {
    for (int64_t first = 0; first < patch.all; first += each_time)
      add_some<most>(patch.all - first < each_time ? patch.all - first : each_time, x, patch.at + first, count, g,
                     narrow + first * inner);
  }

  // Calls the one whose number of sums is known to the compiler.
  template <int some>
  void add_some(int64_t number, const T *x, const int64_t *at, int64_t count, const T *g, T *to) const {
    if (number == some)
      return add_weights<some>(x, at, count, g, to);
    if constexpr (some > 1)
      add_some<some - 1>(number, x, at, count, g, to);
  }

  // `some` weights of every channel: their sums stay in registers while the pixels go by.
  template <int some> void add_weights(const T *image, const int64_t *at, int64_t count, const T *g, T *to) const {
    const int64_t step = patch.step(), inner = this->inner;
    const T *x[some];
    for (int u = 0; u < some; ++u)
      x[u] = image + at[u];
    int64_t c = 0;
    for (; c + lanes <= inner; c += lanes) {
      V sum[some];
      for (int u = 0; u < some; ++u)
        sum[u] = load_vector(to + u * inner + c);
      for (int64_t q = 0; q < count; ++q) {
        const V own = load_vector(g + q * inner + c);
        for (int u = 0; u < some; ++u)
          sum[u] += own * x[u][q * step];
      }
      for (int u = 0; u < some; ++u)
        store_vector(to + u * inner + c, sum[u]);
    }
    for (; c < inner; ++c)
      for (int u = 0; u < some; ++u)
        for (int64_t q = 0; q < count; ++q)
          to[u * inner + c] = muladd(g[q * inner + c], x[u][q * step], to[u * inner + c]);
  }

  void drain() {
    each(weights, [from = narrow, to = sums](int64_t i) {
      to[i] += static_cast<double>(from[i]);
      from[i] = 0;
    });
    pixels = 0;
  }
};
