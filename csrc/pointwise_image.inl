// The gradient of the weight of a convolution that reads few channels, from rows of ∂/∂c that are still in the
// first-level cache: ∂/∂c itself is never written. Included by pointwise.inl, inside the namespace of a level.

// RACECAR_VECTOR bytes in one register.
template <class T> struct Vector;
template <> struct Vector<float> {
  typedef float type __attribute__((vector_size(RACECAR_VECTOR)));
};
template <> struct Vector<double> {
  typedef double type __attribute__((vector_size(RACECAR_VECTOR)));
};

// ∂/∂W[t, k, c] = Σ_q x[k, stride·q + dilation·t - padding] · g[c, q], for the pixels q of a block.
template <class S> struct WeightSums {
  using T = typename Storage<S>::T;
  using V = typename Vector<T>::type;
  static constexpr int64_t lanes = RACECAR_VECTOR / static_cast<int64_t>(sizeof(T));
  static constexpr int few = 256; // pixels that are summed in the type that is computed in, before they go to double
  static constexpr int most = 9;  // sums that stay in registers, of one vector each

  const Image &image;
  const int64_t inner, wide; // channels of c; elements of a row of the image that a run of pixels reads
  T *const narrow;
  double *const sums;
  S *const rows; // of ∂/∂c, for those of a tile
  T *const row;  // one of them, in the type that is computed in
  T *const patch;
  const int64_t all, each_time; // weights of a channel of c, and how many of them are summed at a time
  int64_t *const at;            // where in `patch` they begin to read
  int64_t pixels = 0;

  WeightSums(const Job &job, int64_t block, Arena &arena)
      : image(job.image), inner(job.grid.inner), wide(image.patch), narrow(take<T>(arena, image.weights)),
        sums(wanted() ? image.gradients + block * image.weights : nullptr),
        rows(take<S>(arena, job.grid.rows * job.grid.row)), row(take<T>(arena, job.grid.row)),
        patch(take<T>(arena, image.kernel[0] * wide)), all(wanted() ? image.weights / inner : 0),
        each_time(wanted() ? (all - 1) / ((all - 1) / most + 1) + 1 : 0), at(take<int64_t>(arena, all)) {
    const int64_t across = image.kernel[1] * image.channels;
    for (int64_t w = 0; w < all; ++w)
      at[w] = w / across * wide + w % across / image.channels * image.dilation[1] * image.channels + w % image.channels;
    if (wanted())
      each(image.weights, [to = narrow, sums = sums](int64_t i) { to[i] = 0, sums[i] = 0; });
  }

  bool wanted() const { return image.x != nullptr; }

  // Takes a row of ∂/∂c: n elements, the first of them belongs to element `first` of c.
  void add(const S *given, int64_t first, int64_t n) {
    const T *g = load(given, n, row);
    for (int64_t pixel = first / inner, left = n / inner; left > 0;) {
      const int64_t x = pixel % image.columns, y = pixel / image.columns % image.rows;
      const int64_t some = left < image.columns - x ? left : image.columns - x;
      cut(pixel / image.columns / image.rows, y, x, some);
      add_run(some, g);
      pixel += some, left -= some, g += some * inner;
    }
    if ((pixels += n / inner) >= few)
      drain();
  }

  void finish() {
    if (wanted())
      drain();
  }

private:
  template <class X> X *take(Arena &arena, int64_t n) const { return wanted() ? arena.take<X>(n) : nullptr; }

  // What `count` pixels side by side read of image n, zeros around it: the rows of the kernel under each other.
  void cut(int64_t n, int64_t y, int64_t x, int64_t count) {
    const int64_t reach = (count - 1) * image.stride[1] + (image.kernel[1] - 1) * image.dilation[1] + 1;
    const int64_t left = x * image.stride[1] - image.padding[1], k = image.channels;
    const int64_t begin = left < 0 ? -left : 0, end = image.width - left < reach ? image.width - left : reach;
    for (int64_t i = 0; i < image.kernel[0]; ++i) {
      T *const to = patch + i * wide;
      const int64_t from_y = y * image.stride[0] + i * image.dilation[0] - image.padding[0];
      if (from_y < 0 || from_y >= image.height || begin >= end) {
        each(reach * k, [=](int64_t e) { to[e] = 0; });
        continue;
      }
      const S *const from =
          static_cast<const S *>(image.x) + ((n * image.height + from_y) * image.width + left + begin) * k;
      each(begin * k, [=](int64_t e) { to[e] = 0; });
      each((end - begin) * k, [=](int64_t e) { to[begin * k + e] = Storage<S>::load(from[e]); });
      each((reach - end) * k, [=](int64_t e) { to[end * k + e] = 0; });
    }
  }

  // Every weight's sum over the pixels in `patch`.
  void add_run(int64_t count, const T *g) {
    for (int64_t first = 0; first < all; first += each_time)
      add_some<most>(all - first < each_time ? all - first : each_time, at + first, count, g, narrow + first * inner);
  }

  // Calls the one whose number of sums is known to the compiler.
  template <int some> void add_some(int64_t number, const int64_t *at, int64_t count, const T *g, T *to) const {
    if (number == some)
      return add_weights<some>(at, count, g, to);
    if constexpr (some > 1)
      add_some<some - 1>(number, at, count, g, to);
  }

  // `some` weights of every channel: their sums stay in registers while the pixels go by.
  template <int some> void add_weights(const int64_t *at, int64_t count, const T *g, T *to) const {
    const int64_t step = image.stride[1] * image.channels, inner = this->inner;
    const T *x[some];
    for (int u = 0; u < some; ++u)
      x[u] = patch + at[u];
    int64_t c = 0;
    for (; c + lanes <= inner; c += lanes) {
      V sum[some];
      for (int u = 0; u < some; ++u)
        __builtin_memcpy(&sum[u], to + u * inner + c, sizeof(V));
      for (int64_t q = 0; q < count; ++q) {
        V own;
        __builtin_memcpy(&own, g + q * inner + c, sizeof(V));
        for (int u = 0; u < some; ++u)
          sum[u] += own * x[u][q * step];
      }
      for (int u = 0; u < some; ++u)
        __builtin_memcpy(to + u * inner + c, &sum[u], sizeof(V));
    }
    for (; c < inner; ++c)
      for (int u = 0; u < some; ++u)
        for (int64_t q = 0; q < count; ++q)
          to[u * inner + c] = muladd(g[q * inner + c], x[u][q * step], to[u * inner + c]);
  }

  void drain() {
    each(image.weights, [from = narrow, to = sums](int64_t i) {
      to[i] += static_cast<double>(from[i]);
      from[i] = 0;
    });
    pixels = 0;
  }
};
