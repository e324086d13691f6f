// What the kernels between few and many channels share: how pixels are joined, read, computed where they are read, and
// staged in shared memory.
#pragma once

#include "few_channels.h"
#include "portable.cuh"

namespace racecar {
namespace cuda {

// 16 bytes that are moved at once.
struct alignas(16) Words {
  uint32_t w[4];
};

template <class S> constexpr int per_words = 16 / static_cast<int>(sizeof(S));

// Number i of the 16 bytes.
template <class S> RACECAR_INLINE float unpacked(const Words &words, int i) {
  if constexpr (sizeof(S) == 4)
    return bit_cast<float>(words.w[i]);
  else
    return Storage<S>::load(S{static_cast<uint16_t>(words.w[i / 2] >> (16 * (i % 2)))});
}

template <class S> RACECAR_INLINE Words packed(const float (&v)[per_words<S>]) {
  Words words;
  if constexpr (sizeof(S) == 4)
    for (int i = 0; i < 4; ++i)
      words.w[i] = bit_cast<uint32_t>(v[i]);
  else
    for (int i = 0; i < 4; ++i)
      words.w[i] = Storage<S>::store(v[2 * i]).bits | static_cast<uint32_t>(Storage<S>::store(v[2 * i + 1]).bits) << 16;
  return words;
}

// N channels from memory, of which the first `count` exist; the others are 0.
template <class S, int N> RACECAR_INLINE void load(const S *from, int count, bool wide, float (&v)[N]) {
  if constexpr (N == per_words<S>)
    if (wide) {
      const Words words = *reinterpret_cast<const Words *>(from);
      for (int i = 0; i < N; ++i)
        v[i] = unpacked<S>(words, i);
      return;
    }
  for (int i = 0; i < N; ++i)
    v[i] = i < count ? Storage<S>::load(from[i]) : 0.0f;
}

template <class S, int N> RACECAR_INLINE void store(S *to, int count, bool wide, const float (&v)[N]) {
  if constexpr (N == per_words<S>)
    if (wide) {
      *reinterpret_cast<Words *>(to) = packed<S>(v);
      return;
    }
  for (int i = 0; i < N; ++i)
    if (i < count)
      to[i] = Storage<S>::store(v[i]);
}

// v · scale[c] + shift[c]; neither, or shift alone, may be given.
template <int N> RACECAR_INLINE void affine(const float *scale, const float *shift, int c, int count, float (&v)[N]) {
  if (shift == nullptr)
    return;
  for (int i = 0; i < N; ++i)
    if (i < count)
      v[i] = scale == nullptr ? v[i] + shift[c + i] : muladd(v[i], scale[c + i], shift[c + i]);
}

template <class S, int N> RACECAR_INLINE void activate_all(int32_t act, const float (&p)[3], float (&v)[N]) {
  const racecar::cuda::Params<float> own = {p[0], p[1], p[2]};
  with_constant(static_cast<Act>(act), [&](auto tag) {
    for (int i = 0; i < N; ++i)
      v[i] = rounded_to<S>(activate<decltype(tag)::act>(v[i], own));
  });
}

// Channels c.. of a pixel. at: the number of the pixel's first channel within its image.
template <class S, int N>
RACECAR_INLINE void read(const FewSource &source, int64_t image, int64_t at, int c, int count, bool wide,
                         float (&v)[N]) {
  load(static_cast<const S *>(source.x) + image * source.batch + at + c, count, wide, v);
  if (source.done)
    return;
  affine(source.scale, source.shift, c, count, v);
  activate_all<S>(source.act, source.p, v);
}

template <class S, int N>
RACECAR_INLINE void read(const FewOperand &operand, int64_t image, int64_t at, int c, int count, bool wide,
                         float (&v)[N]) {
  if (!operand.incoming) {
    read<S>(operand.x, image, at, c, count, wide, v);
    if (operand.minus != nullptr)
      for (int i = 0; i < N; ++i)
        v[i] = i < count ? rounded_to<S>(v[i] - operand.minus[c + i]) : 0.0f;
    return;
  }
  float a[N];
  for (int i = 0; i < N; ++i)
    v[i] = 0;
  if (operand.g != nullptr)
    load(static_cast<const S *>(operand.g) + image * operand.g_batch + at + c, count, wide, v);
  if (operand.x.x == nullptr)
    return;
  read<S>(operand.x, image, at, c, count, wide, a);
  if (operand.d.x != nullptr) {
    float d[N];
    read<S>(operand.d, image, at, c, count, wide, d);
    const float c2 = *operand.c2;
    for (int i = 0; i < N; ++i)
      v[i] = muladd(c2, a[i] - d[i], v[i]);
  }
  const racecar::cuda::Params<float> own = {operand.x.p[0], operand.x.p[1], operand.x.p[2]};
  with_constant(static_cast<Act>(operand.x.act), [&](auto tag) {
    for (int i = 0; i < N; ++i)
      v[i] = i < count ? rounded_to<S>(differentiate<decltype(tag)::act>(v[i], a[i], own)) : 0.0f;
  });
}

// ------------------------------------------------------------------------------------------- pixels

// Rounded down, for a divisor above 0.
RACECAR_INLINE int32_t floor_divide(int32_t x, int32_t by) { return (x >= 0 ? x : x - by + 1) / by; }

// The first row (axis 0) or column (axis 1) of what a result from `first` on reads. large: whether the result has the
// size of the operation's input.
RACECAR_INLINE int32_t first_read(const FewParams &p, int axis, int32_t first, bool large) {
  if (!large)
    return first * p.stride[axis] - p.padding[axis];
  const int32_t lowest = first + p.padding[axis] - (p.kernel[axis] - 1) * p.dilation[axis];
  return floor_divide(lowest + p.stride[axis] - 1, p.stride[axis]);
}

// The row or column that tap t joins with `place`, -1 where it joins it with none inside `size`.
RACECAR_INLINE int32_t joined(const FewParams &p, int axis, int32_t place, int32_t t, bool large, int32_t size) {
  const int32_t shift = t * p.dilation[axis] - p.padding[axis], stride = p.stride[axis];
  int32_t found = large ? place - shift : place * stride + shift;
  if (large && stride > 1) {
    const int32_t divided = floor_divide(found, stride);
    found = divided * stride == found ? divided : -1;
  }
  return found >= 0 && found < size ? found : -1;
}

// Where a block works: image, first row and column of its tile.
struct Tile {
  int64_t image;
  int32_t y, x;
};

RACECAR_INLINE Tile tile_of(const FewParams &p, int64_t number) {
  const int64_t each = p.tiles[0] * p.tiles[1], image = number / each;
  const int32_t rest = static_cast<int32_t>(number - image * each), columns = static_cast<int32_t>(p.tiles[1]);
  const int32_t row = rest / columns;
  return {image, row * p.tile[0], (rest - row * columns) * p.tile[1]};
}

// Weight (many c, few f, tap number), 0 beyond the last channel.
template <class S> RACECAR_INLINE float weight_at(const FewParams &p, int32_t c, int32_t f, int32_t tap) {
  if (c >= p.channels)
    return 0;
  const int32_t row = tap / p.kernel[1];
  return Storage<S>::load(
      static_cast<const S *>(p.weight)[c * p.weight_stride[0] + f * p.weight_stride[1] + row * p.weight_stride[2] +
                                       (tap - row * p.kernel[1]) * p.weight_stride[3]]);
}

// Channels c.. of a tile of many channels, `vectors` times 16 bytes of each pixel, zeros outside the image.
template <class S>
RACECAR_INLINE void stage_many(const FewParams &p, int64_t image, int32_t y, int32_t x, int32_t rows, int32_t columns,
                               int32_t c, int32_t vectors, int32_t pitch, int thread, int threads, Words *to) {
  for (int32_t item = thread; item < rows * columns * vectors; item += threads) {
    const int32_t pixel = item / vectors, vector = item - pixel * vectors, row = pixel / columns;
    const int32_t at_y = y + row, at_x = x + pixel - row * columns, from = c + vector * per_words<S>;
    float v[per_words<S>];
    for (int i = 0; i < per_words<S>; ++i)
      v[i] = 0;
    if (at_y >= 0 && at_y < p.many_size[0] && at_x >= 0 && at_x < p.many_size[1] && from < p.channels)
      read<S>(p.many, image, (static_cast<int64_t>(at_y) * p.many_size[1] + at_x) * p.channels, from, p.channels - from,
              p.wide != 0, v);
    to[pixel * pitch + vector] = packed<S>(v);
  }
}

// Few channels are float32 in shared memory, three of them in the room of four.
template <int F> using FewPixel = Floats<F == 3 ? 4 : F>;

template <class S, int F>
RACECAR_INLINE void stage_few(const FewParams &p, int64_t image, int32_t y, int32_t x, int thread, int threads,
                              FewPixel<F> *to) {
  for (int32_t pixel = thread; pixel < p.rect[0] * p.rect[1]; pixel += threads) {
    const int32_t row = pixel / p.rect[1], at_y = y + row, at_x = x + pixel - row * p.rect[1];
    float v[F] = {};
    if (at_y >= 0 && at_y < p.few_size[0] && at_x >= 0 && at_x < p.few_size[1])
      read<S>(p.few, image, (static_cast<int64_t>(at_y) * p.few_size[1] + at_x) * F, 0, F, false, v);
    for (int f = 0; f < F; ++f)
      to[pixel].v[f] = v[f];
  }
}

// The reduction goes over taps and few channels in groups of this many taps: what a thread keeps in registers.
template <int F> constexpr int taps_of_group = F == 1 ? 9 : F == 2 ? 5 : 3;

RACECAR_INLINE int32_t taps(const FewParams &p) { return p.kernel[0] * p.kernel[1]; }
template <int F> RACECAR_INLINE int32_t groups(const FewParams &p) {
  return (taps(p) + taps_of_group<F> - 1) / taps_of_group<F>;
}

// Calls f with Kernel<type, few>, so that the choice is made on the host.
template <template <class, int> class Kernel, class F> auto with_few(Number number, int few, F f) {
  return with_number(number, [&](auto of) {
    using S = decltype(of);
    switch (few) {
    case 1:
      return f(static_cast<Kernel<S, 1> *>(nullptr));
    case 2:
      return f(static_cast<Kernel<S, 2> *>(nullptr));
    case 3:
      return f(static_cast<Kernel<S, 3> *>(nullptr));
    default:
      return f(static_cast<Kernel<S, 4> *>(nullptr));
    }
  });
}

// ------------------------------------------------------------------------------------------- the epilogue

// Of N channels from c on of a pixel of u; the pixel's Σ (d - undo(a))². size: of u; all: its channels.
template <class S, int N>
RACECAR_INLINE float finish(const FewEpilogue &to, int64_t image, int32_t y, int32_t x, const int32_t (&size)[2],
                            int32_t all, int32_t c, bool wide, float (&v)[N]) {
  const int32_t count = all - c;
  const int64_t at = ((image * size[0] + y) * size[1] + x) * all + c;
  S *const out = static_cast<S *>(to.out), *const source = static_cast<S *>(to.source);
  if (to.keep_u && out != nullptr)
    store(out + at, count, wide, v);
  if (!to.keep_u || source != nullptr || to.squares != nullptr) {
    affine(to.scale, to.shift, c, count, v);
    activate_all<S>(to.act, to.p, v);
  }
  if (!to.keep_u && out != nullptr)
    store(out + at, count, wide, v);
  if (source != nullptr) {
    float less[N];
    for (int i = 0; i < N; ++i)
      less[i] = v[i] - (to.minus != nullptr && i < count ? to.minus[c + i] : 0.0f);
    store(source + at, count, wide, less);
  }
  if (to.squares == nullptr)
    return 0;
  float sum = 0;
  const int32_t bottom = y == size[0] - 1 ? to.d_size[0] : (y + 1) * to.window[0];
  const int32_t right = x == size[1] - 1 ? to.d_size[1] : (x + 1) * to.window[1];
  for (int32_t row = y * to.window[0]; row < bottom; ++row)
    for (int32_t column = x * to.window[1]; column < right; ++column) {
      float d[N];
      read<S>(to.d, image, (static_cast<int64_t>(row) * to.d_size[1] + column) * all, c, count, wide, d);
      for (int i = 0; i < N; ++i)
        if (i < count)
          sum = muladd(d[i] - v[i], d[i] - v[i], sum);
    }
  return sum;
}

} // namespace cuda
} // namespace racecar
