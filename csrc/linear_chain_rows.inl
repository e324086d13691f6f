// Registers and the four loops that a chain of linear layers is made of, over blocks of kChainRows rows.
// Included by linear_chain.inl, inside the namespace of a level.

constexpr int64_t kRows = kChainRows;

// Calls f(0 .. n-1); f may read and write what belongs to its own index, in place too.
template <class F> RACECAR_INLINE void each(int64_t n, F f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    f(i);
}

// A register full of numbers.
template <class T> struct Register {
  typedef T Type __attribute__((vector_size(RACECAR_VECTOR)));
};
template <class T> using Pack = typename Register<T>::Type;
template <class T> constexpr int64_t kLanes = sizeof(Pack<T>) / sizeof(T);

template <class T> RACECAR_INLINE Pack<T> pack(const T *from) {
  Pack<T> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}
template <class T> RACECAR_INLINE void unpack(Pack<T> x, T *to) { __builtin_memcpy(to, &x, sizeof(x)); }

#if RACECAR_VECTOR == 64
RACECAR_INLINE Pack<float> fused(Pack<float> x, Pack<float> y, Pack<float> z) {
  return bit_cast<Pack<float>>(_mm512_fmadd_ps(bit_cast<__m512>(x), bit_cast<__m512>(y), bit_cast<__m512>(z)));
}
RACECAR_INLINE Pack<double> fused(Pack<double> x, Pack<double> y, Pack<double> z) {
  return bit_cast<Pack<double>>(_mm512_fmadd_pd(bit_cast<__m512d>(x), bit_cast<__m512d>(y), bit_cast<__m512d>(z)));
}
#elif RACECAR_VECTOR == 32
RACECAR_INLINE Pack<float> fused(Pack<float> x, Pack<float> y, Pack<float> z) {
  return bit_cast<Pack<float>>(_mm256_fmadd_ps(bit_cast<__m256>(x), bit_cast<__m256>(y), bit_cast<__m256>(z)));
}
RACECAR_INLINE Pack<double> fused(Pack<double> x, Pack<double> y, Pack<double> z) {
  return bit_cast<Pack<double>>(_mm256_fmadd_pd(bit_cast<__m256d>(x), bit_cast<__m256d>(y), bit_cast<__m256d>(z)));
}
#else
template <class V> RACECAR_INLINE V fused(V x, V y, V z) { return x * y + z; }
#endif
template <class T> RACECAR_INLINE Pack<T> all_lanes(T x) { return x - Pack<T>{}; }

// out[o] = start[o] + Σ_i w(o, i) in[i] for `outs` features at once; without start, from 0.
template <int outs, class T>
RACECAR_INLINE void multiply_few(const T *w, int64_t by_out, int64_t by_in, int64_t ins, const T *in, const T *start,
                                 T *out) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t r = 0; r < kRows; r += 2 * lanes) {
    Pack<T> sum[outs][2];
    for (int o = 0; o < outs; ++o)
      sum[o][0] = sum[o][1] = all_lanes(start ? start[o] : static_cast<T>(0));
    for (int64_t i = 0; i < ins; ++i) {
      const Pack<T> low = pack(in + i * kRows + r), high = pack(in + i * kRows + r + lanes);
      for (int o = 0; o < outs; ++o) {
        const Pack<T> factor = all_lanes(w[o * by_out + i * by_in]);
        sum[o][0] = fused(factor, low, sum[o][0]);
        sum[o][1] = fused(factor, high, sum[o][1]);
      }
    }
    for (int o = 0; o < outs; ++o) {
      unpack(sum[o][0], out + o * kRows + r);
      unpack(sum[o][1], out + o * kRows + r + lanes);
    }
  }
}

template <class T>
inline void multiply(const T *w, int64_t by_out, int64_t by_in, int64_t outs, int64_t ins, const T *in, const T *start,
                     T *out) {
  int64_t o = 0;
  for (; o + 4 <= outs; o += 4)
    multiply_few<4>(w + o * by_out, by_out, by_in, ins, in, start ? start + o : nullptr, out + o * kRows);
  const T *const rest = w + o * by_out, *const from = start ? start + o : nullptr;
  if (outs - o == 3)
    multiply_few<3>(rest, by_out, by_in, ins, in, from, out + o * kRows);
  else if (outs - o == 2)
    multiply_few<2>(rest, by_out, by_in, ins, in, from, out + o * kRows);
  else if (outs - o == 1)
    multiply_few<1>(rest, by_out, by_in, ins, in, from, out + o * kRows);
}

// sums[o][i] += g[o] · d[i], lane by lane: the lanes are added up once, behind all blocks of a chunk.
template <int outs, int ins, class T>
RACECAR_INLINE void correlate_few(const T *g, const T *d, int64_t width, T *sums) {
  constexpr int64_t lanes = kLanes<T>;
  Pack<T> sum[outs][ins];
  for (int o = 0; o < outs; ++o)
    for (int i = 0; i < ins; ++i)
      sum[o][i] = pack(sums + (o * width + i) * lanes);
  for (int64_t r = 0; r < kRows; r += lanes) {
    Pack<T> right[ins];
    for (int i = 0; i < ins; ++i)
      right[i] = pack(d + i * kRows + r);
    for (int o = 0; o < outs; ++o) {
      const Pack<T> left = pack(g + o * kRows + r);
      for (int i = 0; i < ins; ++i)
        sum[o][i] = fused(left, right[i], sum[o][i]);
    }
  }
  for (int o = 0; o < outs; ++o)
    for (int i = 0; i < ins; ++i)
      unpack(sum[o][i], sums + (o * width + i) * lanes);
}

template <int outs, class T> inline void correlate_row(const T *g, const T *d, int64_t width, T *sums) {
  int64_t i = 0;
  for (; i + 4 <= width; i += 4)
    correlate_few<outs, 4>(g, d + i * kRows, width, sums + i * kLanes<T>);
  for (; i < width; ++i)
    correlate_few<outs, 1>(g, d + i * kRows, width, sums + i * kLanes<T>);
}

template <class T> inline void correlate(const T *g, int64_t outs, const T *d, int64_t width, T *sums) {
  int64_t o = 0;
  for (; o + 2 <= outs; o += 2)
    correlate_row<2>(g + o * kRows, d, width, sums + o * width * kLanes<T>);
  if (o < outs)
    correlate_row<1>(g + o * kRows, d, width, sums + o * width * kLanes<T>);
}

// sums[o] += factor · g[o], lane by lane.
template <class T> inline void add_rows(const T *g, int64_t outs, T factor, T *sums) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t o = 0; o < outs; ++o) {
    Pack<T> sum{};
    for (int64_t r = 0; r < kRows; r += lanes)
      sum += pack(g + o * kRows + r);
    unpack(fused(all_lanes(factor), sum, pack(sums + o * lanes)), sums + o * lanes);
  }
}

// Matrices (rows, features) to [feature][kRows] and back. Rows behind the batch repeat the last one, so that they hold
// no other kind of number than the batch does.
template <class S, class T> inline void load_rows(const S *from, int64_t n, int64_t features, T *to) {
  for (int64_t f = 0; f < features; ++f)
    for (int64_t r = 0; r < kRows; ++r)
      to[f * kRows + r] = Storage<S>::load(from[(r < n ? r : n - 1) * features + f]);
}

template <class S, class T> inline void store_rows(const T *from, int64_t n, int64_t features, S *to) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t f = 0; f < features; ++f)
      to[r * features + f] = Storage<S>::store(from[f * kRows + r]);
}

// [feature][n], as it is kept, to [feature][kRows] and back.
template <class S, class T> inline void load_kept(const S *from, int64_t n, int64_t features, T *to) {
  if (n == kRows)
    return each(features * kRows, [=](int64_t i) { to[i] = Storage<S>::load(from[i]); });
  for (int64_t f = 0; f < features; ++f)
    for (int64_t r = 0; r < kRows; ++r)
      to[f * kRows + r] = Storage<S>::load(from[f * n + (r < n ? r : n - 1)]);
}

template <class S, class T> inline void store_kept(const T *from, int64_t n, int64_t features, S *to) {
  for (int64_t f = 0; f < features; ++f)
    each(n, [=](int64_t r) { to[f * n + r] = Storage<S>::store(from[f * kRows + r]); });
}

// Rows behind the batch have no gradient.
template <class T> inline void clear_padding(T *g, int64_t n, int64_t features) {
  if (n < kRows)
    for (int64_t f = 0; f < features; ++f)
      for (int64_t r = n; r < kRows; ++r)
        g[f * kRows + r] = 0;
}
