// From few channels to many: out[o, c] = Σ_tap Σ_f s[joined(o, tap), f] · W[c, f, tap], with the epilogue.
//
// A thread computes 16 bytes of channels of a few pixels; what all pixels of its block read, and the weights of its
// block's channels, lie in shared memory.
#pragma once

#include "few_channels_memory.cuh"

namespace racecar {
namespace cuda {

template <class S, int F> struct Wide {
  using Params = FewParams;
  struct Thread {};
  static constexpr int threads = 256;
  static constexpr int N = per_words<S>; // channels of a thread
  static constexpr int pixels = 32 / N;  // and its pixels
  static constexpr int summing = 16;

  static RACECAR_INLINE int32_t block_channels(const Params &p) { return p.lanes * N; }
  static RACECAR_INLINE int32_t blocks_of_channels(const Params &p) {
    return (p.channels + block_channels(p) - 1) / block_channels(p);
  }
  static RACECAR_INLINE bool reduces(const Params &p) { return p.to.squares != nullptr || p.to.sums != nullptr; }

  static int64_t blocks(const Params &p) { return p.images * p.tiles[0] * p.tiles[1] * blocks_of_channels(p); }
  static int64_t shared(const Params &p) {
    return int64_t{4} * taps(p) * F * block_channels(p) + int64_t{4} * threads * (N + 1) + 4 * summing +
           static_cast<int64_t>(sizeof(FewPixel<F>)) * p.rect[0] * p.rect[1];
  }
  static RACECAR_INLINE int steps(const Params &p) { return reduces(p) ? 4 : 2; }

  struct Shared {
    Floats<4> *weights; // [tap][f][c]
    float *sums;        // [thread][c]
    float *squares;     // of every thread, then of every summing one
    FewPixel<F> *source;
  };
  static RACECAR_INLINE Shared shared_of(const Params &p, void *memory) {
    Shared own;
    own.weights = static_cast<Floats<4> *>(memory);
    own.sums = reinterpret_cast<float *>(own.weights + taps(p) * F * block_channels(p) / 4);
    own.squares = own.sums + threads * N;
    own.source = reinterpret_cast<FewPixel<F> *>(own.squares + threads + summing);
    return own;
  }

  static RACECAR_INLINE void step(const Params &p, int step, Place place, void *memory, Thread &) {
    const Shared own = shared_of(p, memory);
    const int32_t apart = blocks_of_channels(p);
    const int64_t number = place.block / apart;
    const int32_t c = static_cast<int32_t>(place.block - number * apart) * block_channels(p);
    const Tile tile = tile_of(p, number);
    if (step == 0)
      stage(p, tile, c, place.thread, own);
    else if (step == 1)
      multiply(p, tile, c, place.thread, own);
    else
      reduce(p, step, number, c, place, own);
  }

  static RACECAR_INLINE void stage(const Params &p, Tile tile, int32_t c, int thread, Shared own) {
    const bool large = p.few_is_large == 0; // of the result, which has many channels
    stage_few<S, F>(p, tile.image, first_read(p, 0, tile.y, large), first_read(p, 1, tile.x, large), thread, threads,
                    own.source);
    float *const to = reinterpret_cast<float *>(own.weights);
    const int32_t row = block_channels(p);
    for (int32_t item = thread; item < taps(p) * F * row; item += threads) {
      const int32_t at = item / row;
      to[item] = weight_at<S>(p, c + item - at * row, at % F, at / F);
    }
  }

  static RACECAR_INLINE void multiply(const Params &p, Tile tile, int32_t c, int thread, Shared own) {
    const bool large = p.few_is_large == 0;
    const int32_t from_y = first_read(p, 0, tile.y, large), from_x = first_read(p, 1, tile.x, large);
    const int32_t lane = thread % p.lanes, first = thread / p.lanes, apart = threads / p.lanes;
    int32_t y[pixels], x[pixels];
    for (int k = 0; k < pixels; ++k) {
      const int32_t o = first + k * apart, row = o / p.tile[1];
      y[k] = row < p.tile[0] ? tile.y + row : p.many_size[0];
      x[k] = tile.x + o - row * p.tile[1];
    }
    float acc[pixels][N] = {};
    const Floats<4> *weights = own.weights + lane * (N / 4);
    for (int32_t i = 0; i < p.kernel[0]; ++i)
      for (int32_t j = 0; j < p.kernel[1]; ++j, weights += F * (block_channels(p) / 4)) {
        Floats<4> w[F][N / 4];
        for (int f = 0; f < F; ++f)
          for (int v = 0; v < N / 4; ++v)
            w[f][v] = weights[f * (block_channels(p) / 4) + v];
        RACECAR_UNROLLED
        for (int k = 0; k < pixels; ++k) {
          const int32_t at_y = joined(p, 0, y[k], i, large, p.few_size[0]);
          const int32_t at_x = joined(p, 1, x[k], j, large, p.few_size[1]);
          if (at_y < 0 || at_x < 0 || y[k] >= p.many_size[0] || x[k] >= p.many_size[1])
            continue;
          const FewPixel<F> s = own.source[(at_y - from_y) * p.rect[1] + at_x - from_x];
          for (int f = 0; f < F; ++f)
            for (int n = 0; n < N; ++n)
              acc[k][n] = muladd(s.v[f], w[f][n / 4].v[n % 4], acc[k][n]);
        }
      }
    float squares = 0, sums[N] = {};
    RACECAR_ROLLED
    for (int k = 0; k < pixels; ++k) { // one copy of the epilogue: registers are picked, for they cannot be indexed
      float u[N] = {};
      int32_t at_y = 0, at_x = 0;
      RACECAR_UNROLLED
      for (int i = 0; i < pixels; ++i) {
        at_y = i == k ? y[i] : at_y;
        at_x = i == k ? x[i] : at_x;
        for (int n = 0; n < N; ++n)
          u[n] = i == k ? acc[i][n] : u[n];
      }
      if (at_y >= p.many_size[0] || at_x >= p.many_size[1] || c + lane * N >= p.channels)
        continue;
      for (int n = 0; n < N; ++n)
        sums[n] += u[n];
      squares += finish<S>(p.to, tile.image, at_y, at_x, p.many_size, p.channels, c + lane * N, p.wide != 0, u);
    }
    if (!reduces(p))
      return;
    own.squares[thread] = squares;
    for (int n = 0; n < N; ++n)
      own.sums[thread * N + n] = sums[n];
  }

  // What every thread summed, in two steps and always in the same order.
  static RACECAR_INLINE void reduce(const Params &p, int step, int64_t number, int32_t c, Place place, Shared own) {
    if (step == 2) {
      if (p.to.sums != nullptr)
        for (int32_t at = place.thread; at < block_channels(p) && c + at < p.channels; at += threads) {
          float total = 0;
          for (int32_t k = 0; k < threads / p.lanes; ++k)
            total += own.sums[k * block_channels(p) + at];
          p.to.sums[number * p.channels + c + at] = total;
        }
      if (place.thread < summing) {
        float total = 0;
        for (int k = 0; k < threads / summing; ++k)
          total += own.squares[place.thread * (threads / summing) + k];
        own.squares[threads + place.thread] = total;
      }
    } else if (place.thread == 0 && p.to.squares != nullptr) {
      float total = 0;
      for (int k = 0; k < summing; ++k)
        total += own.squares[threads + k];
      p.to.squares[place.block] = total;
    }
  }
};

} // namespace cuda
} // namespace racecar
