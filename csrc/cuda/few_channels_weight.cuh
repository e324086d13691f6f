// The gradient of the weight between few and many channels: Σ over pixels o of many[o, c] · few[joined(o, tap), f].
//
// A block goes through its run of tiles; a thread keeps the sums of four channels with a group of taps, for every
// n-th pixel of a tile. Sums of blocks are written beside each other and added up by whoever launched the kernel, so
// that the result does not depend on which block was the first. No atomics.
#pragma once

#include "few_channels_memory.cuh"

namespace racecar {
namespace cuda {

template <class S, int F> struct WeightSums {
  using Params = FewParams;
  static constexpr int threads = 256;
  static constexpr int channels = 4; // of a thread
  static constexpr int group_taps = taps_of_group<F>, columns = group_taps * F;
  struct Thread {
    float acc[channels][columns];
  };

  static RACECAR_INLINE int32_t block_channels(const Params &p) { return p.lanes * channels; }
  static RACECAR_INLINE int32_t blocks_of_channels(const Params &p) {
    return (p.channels + block_channels(p) - 1) / block_channels(p);
  }
  static RACECAR_INLINE int32_t units(const Params &p) { return p.lanes * groups<F>(p); }
  static RACECAR_INLINE int32_t vectors(const Params &p) { return block_channels(p) / per_words<S>; }
  static RACECAR_INLINE int32_t pitch(const Params &p) { return vectors(p) | 1; }

  static int64_t blocks(const Params &p) { return int64_t{p.rows} * blocks_of_channels(p); }
  static int64_t shared(const Params &p) {
    const int64_t tile = int64_t{16} * p.tile[0] * p.tile[1] * pitch(p) +
                         static_cast<int64_t>(sizeof(FewPixel<F>)) * p.rect[0] * p.rect[1];
    const int64_t sums = static_cast<int64_t>(sizeof(Thread)) * threads;
    return tile > sums ? tile : sums;
  }
  static RACECAR_INLINE int steps(const Params &p) { return 2 * static_cast<int>(p.each) + 2; }

  static RACECAR_INLINE void step(const Params &p, int step, Place place, void *memory, Thread &own) {
    const int32_t apart = blocks_of_channels(p);
    const int64_t row = place.block / apart, number = row * p.each + step / 2;
    const int32_t c = static_cast<int32_t>(place.block - row * apart) * block_channels(p);
    if (step == steps(p) - 2)
      static_cast<Thread *>(memory)[place.thread] = own;
    else if (step == steps(p) - 1)
      add_up(p, row, c, place.thread, static_cast<const float *>(memory));
    else if (number < p.images * p.tiles[0] * p.tiles[1]) {
      const Tile tile = tile_of(p, number);
      const bool large = p.few_is_large == 0; // of the image of many channels
      Words *const many = static_cast<Words *>(memory);
      auto *const few = reinterpret_cast<FewPixel<F> *>(many + p.tile[0] * p.tile[1] * pitch(p));
      const int32_t from_y = first_read(p, 0, tile.y, large), from_x = first_read(p, 1, tile.x, large);
      if (step % 2 == 0) {
        stage_many<S>(p, tile.image, tile.y, tile.x, p.tile[0], p.tile[1], c, vectors(p), pitch(p), place.thread,
                      threads, many);
        stage_few<S, F>(p, tile.image, from_y, from_x, place.thread, threads, few);
      } else if (place.thread < threads / units(p) * units(p)) {
        multiply(p, tile, from_y, from_x, place.thread, many, few, own);
      }
    }
  }

  static RACECAR_INLINE void multiply(const Params &p, Tile tile, int32_t from_y, int32_t from_x, int thread,
                                      const Words *many, const FewPixel<F> *few, Thread &own) {
    const bool large = p.few_is_large == 0;
    const int32_t lane = thread % p.lanes, rest = thread / p.lanes;
    const int32_t group = rest % groups<F>(p), split = rest / groups<F>(p), splits = threads / units(p);
    int32_t tap_y[group_taps], tap_x[group_taps];
    for (int t = 0; t < group_taps; ++t) {
      const int32_t tap = group * group_taps + t;
      tap_y[t] = tap / p.kernel[1]; // beyond the last one: kernel[0] or more
      tap_x[t] = tap - tap_y[t] * p.kernel[1];
    }
    for (int32_t o = split; o < p.tile[0] * p.tile[1]; o += splits) {
      const int32_t row = o / p.tile[1], y = tile.y + row, x = tile.x + o - row * p.tile[1];
      if (y >= p.many_size[0] || x >= p.many_size[1])
        continue;
      const Words words = many[o * pitch(p) + lane * channels / per_words<S>];
      float s[channels];
      for (int k = 0; k < channels; ++k)
        s[k] = sizeof(S) == 4 || lane % 2 == 0 ? unpacked<S>(words, k) : unpacked<S>(words, (k + 4) % per_words<S>);
      for (int t = 0; t < group_taps; ++t) {
        if (tap_y[t] >= p.kernel[0])
          continue;
        const int32_t at_y = joined(p, 0, y, tap_y[t], large, p.few_size[0]);
        const int32_t at_x = joined(p, 1, x, tap_x[t], large, p.few_size[1]);
        if (at_y < 0 || at_x < 0)
          continue;
        const FewPixel<F> g = few[(at_y - from_y) * p.rect[1] + at_x - from_x];
        for (int k = 0; k < channels; ++k)
          for (int f = 0; f < F; ++f)
            own.acc[k][t * F + f] = muladd(s[k], g.v[f], own.acc[k][t * F + f]);
      }
    }
  }

  // sums: what every thread kept.
  static RACECAR_INLINE void add_up(const Params &p, int64_t row, int32_t c, int thread, const float *sums) {
    constexpr int each = channels * columns;
    const int32_t splits = threads / units(p);
    for (int32_t item = thread; item < units(p) * each; item += threads) {
      const int32_t unit = item / each, rest = item - unit * each, k = rest / columns, column = rest - k * columns;
      const int32_t at = c + unit % p.lanes * channels + k, tap = unit / p.lanes * group_taps + column / F;
      if (at >= p.channels || tap >= taps(p))
        continue;
      float total = 0;
      for (int32_t split = 0; split < splits; ++split)
        total += sums[split * units(p) * each + item];
      p.partials[((row * p.channels + at) * F + column % F) * taps(p) + tap] = total;
    }
  }
};

} // namespace cuda
} // namespace racecar
