// From many channels to few: out[o, f] = Σ_tap Σ_c s[joined(o, tap), c] · W[c, f, tap], with the epilogue.
//
// As a matrix product and a gathering: every pixel of the source is multiplied with the weights of all taps at once,
// z[pixel, tap, f] = Σ_c s[pixel, c] · W[c, f, tap], while its channels are in registers; then out adds up the z that
// reach it. No stride is met with zeros, and a source is read once for all taps but for the tiles' borders.
#pragma once

#include "few_channels_memory.cuh"

namespace racecar {
namespace cuda {

template <class S, int F> struct Narrow {
  using Params = FewParams;
  struct Thread {};
  static constexpr int threads = 256;
  static constexpr int chunk = 32; // channels that are staged at once
  static constexpr int pixels = 4; // of a thread
  static constexpr int columns = taps_of_group<F> * F, padded = (columns + 3) / 4 * 4;
  static constexpr int vectors = chunk / per_words<S>, pitch = vectors | 1; // odd: neighbours in other banks
  static constexpr int sums = 1 + F, summing = 16;                          // threads of the last sum but one

  static RACECAR_INLINE int32_t read_pixels(const Params &p) { return p.rect[0] * p.rect[1]; }
  static RACECAR_INLINE int32_t z_pitch(const Params &p) { return groups<F>(p) * columns | 1; }
  static RACECAR_INLINE int32_t chunks(const Params &p) { return (p.channels + chunk - 1) / chunk; }
  static RACECAR_INLINE bool reduces(const Params &p) { return p.to.squares != nullptr || p.to.sums != nullptr; }

  static int64_t blocks(const Params &p) { return p.images * p.tiles[0] * p.tiles[1]; }
  static int64_t shared(const Params &p) {
    return int64_t{16} * read_pixels(p) * pitch + int64_t{4} * chunk * groups<F>(p) * padded +
           int64_t{4} * read_pixels(p) * z_pitch(p) + int64_t{4} * (threads + summing) * sums;
  }
  static RACECAR_INLINE int steps(const Params &p) { return 2 * chunks(p) + (reduces(p) ? 3 : 1); }

  struct Shared {
    Words *source;
    Floats<4> *weights;
    float *z, *reduction;
  };
  static RACECAR_INLINE Shared shared_of(const Params &p, void *memory) {
    Shared own;
    own.source = static_cast<Words *>(memory);
    own.weights = reinterpret_cast<Floats<4> *>(own.source + read_pixels(p) * pitch);
    own.z = reinterpret_cast<float *>(own.weights + chunk * groups<F>(p) * padded / 4);
    own.reduction = own.z + read_pixels(p) * z_pitch(p);
    return own;
  }

  static RACECAR_INLINE void step(const Params &p, int step, Place place, void *memory, Thread &) {
    const Shared own = shared_of(p, memory);
    const int last = 2 * chunks(p);
    if (step < last) {
      if (step % 2 == 0)
        stage(p, step / 2, place, own);
      else
        multiply(p, step / 2, place.thread, own);
    } else if (step == last) {
      gather(p, place, own);
    } else {
      reduce(p, step - last, place, own.reduction);
    }
  }

  static RACECAR_INLINE void stage(const Params &p, int number, Place place, Shared own) {
    const Tile tile = tile_of(p, place.block);
    const bool large = p.few_is_large != 0;
    stage_many<S>(p, tile.image, first_read(p, 0, tile.y, large), first_read(p, 1, tile.x, large), p.rect[0], p.rect[1],
                  number * chunk, vectors, pitch, place.thread, threads, own.source);
    float *const to = reinterpret_cast<float *>(own.weights);
    const int32_t row = groups<F>(p) * padded;
    for (int32_t item = place.thread; item < chunk * row; item += threads) {
      const int32_t c = item / row, group = (item - c * row) / padded, column = item % padded;
      const int32_t tap = group * taps_of_group<F> + column / F;
      to[item] = column < columns && tap < taps(p) ? weight_at<S>(p, number * chunk + c, column % F, tap) : 0.0f;
    }
  }

  static RACECAR_INLINE void multiply(const Params &p, int number, int thread, Shared own) {
    const int32_t all = read_pixels(p), each = (all + pixels - 1) / pixels, count = groups<F>(p);
    const int32_t left = p.channels - number * chunk, blocks = (left < chunk ? left : chunk) + per_words<S> - 1;
    for (int32_t unit = thread; unit < each * count; unit += threads) {
      const int32_t group = unit / each, first = unit - group * each;
      float acc[pixels][columns] = {};
      for (int32_t vector = 0; vector < blocks / per_words<S>; ++vector) {
        Words s[pixels];
        for (int k = 0; k < pixels; ++k) {
          const int32_t pixel = first + k * each; // beside what the neighbours take
          s[k] = own.source[(pixel < all ? pixel : all - 1) * pitch + vector];
        }
        const Floats<4> *from = own.weights + (vector * per_words<S> * count + group) * (padded / 4);
        for (int e = 0; e < per_words<S>; ++e, from += count * (padded / 4)) {
          Floats<4> w[padded / 4];
          for (int i = 0; i < padded / 4; ++i)
            w[i] = from[i];
          for (int k = 0; k < pixels; ++k)
            for (int i = 0; i < columns; ++i)
              acc[k][i] = muladd(unpacked<S>(s[k], e), w[i / 4].v[i % 4], acc[k][i]);
        }
      }
      for (int k = 0; k < pixels; ++k)
        if (first + k * each < all)
          for (int i = 0; i < columns; ++i) {
            float *const z = own.z + (first + k * each) * z_pitch(p) + group * columns + i;
            *z = number == 0 ? acc[k][i] : *z + acc[k][i];
          }
    }
  }

  static RACECAR_INLINE void gather(const Params &p, Place place, Shared own) {
    const Tile tile = tile_of(p, place.block);
    const bool large = p.few_is_large != 0;
    const int32_t from_y = first_read(p, 0, tile.y, large), from_x = first_read(p, 1, tile.x, large);
    float total[sums] = {};
    for (int32_t o = place.thread; o < p.tile[0] * p.tile[1]; o += threads) {
      const int32_t row = o / p.tile[1], y = tile.y + row, x = tile.x + o - row * p.tile[1];
      if (y >= p.few_size[0] || x >= p.few_size[1])
        continue;
      float u[F] = {};
      for (int32_t i = 0; i < p.kernel[0]; ++i) {
        const int32_t at_y = joined(p, 0, y, i, large, p.many_size[0]);
        if (at_y < 0)
          continue;
        const float *const z = own.z + (at_y - from_y) * p.rect[1] * z_pitch(p) + i * p.kernel[1] * F;
        for (int32_t j = 0; j < p.kernel[1]; ++j) {
          const int32_t at_x = joined(p, 1, x, j, large, p.many_size[1]);
          if (at_x >= 0)
            for (int f = 0; f < F; ++f)
              u[f] += z[(at_x - from_x) * z_pitch(p) + j * F + f];
        }
      }
      for (int f = 0; f < F; ++f)
        total[1 + f] += u[f];
      total[0] += finish<S>(p.to, tile.image, y, x, p.few_size, F, 0, false, u);
    }
    for (int i = 0; i < sums; ++i)
      own.reduction[place.thread * sums + i] = total[i];
  }

  // What every thread summed, in two steps and always in the same order.
  static RACECAR_INLINE void reduce(const Params &p, int step, Place place, float *reduction) {
    const int32_t of = step == 1 ? threads / summing : summing, threads_now = step == 1 ? summing : 1;
    if (place.thread >= threads_now)
      return;
    const float *const from = reduction + (step == 1 ? place.thread * of : threads) * sums;
    for (int i = 0; i < sums; ++i) {
      float total = 0;
      for (int32_t k = 0; k < of; ++k)
        total += from[k * sums + i];
      if (step == 1)
        reduction[(threads + place.thread) * sums + i] = total;
      else if (i == 0 && p.to.squares != nullptr)
        p.to.squares[place.block] = total;
      else if (i > 0 && p.to.sums != nullptr)
        p.to.sums[place.block * F + i - 1] = total;
    }
  }
};

} // namespace cuda
} // namespace racecar
