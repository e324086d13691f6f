// What both directions of a chain of linear layers share: shared memory, products of a tile of rows with a weight, and
// the steps forth and back.
//
// Shared memory holds all weights, and of every tile of rows all d, a and, backwards, their gradients: [feature][row],
// so that a thread reads four rows at once. Features are padded to multiples of four by zeros. A thread computes units
// of four features × four rows. Rows behind the batch repeat the last one, as on the CPU, and have no gradient.
#pragma once

#include "linear_chain.h"

namespace racecar {
namespace cuda {

// Where the parts lie, and what a thread needs in every step.
struct ChainBlock {
  float *weights, *d, *a, *losses, *c, *u, *g, *bias_sums;
  int64_t begin; // first row of the tile
  int32_t rows;  // of the tile that exist; 0 or fewer: the tile does not
  int32_t pitch, thread;
};

RACECAR_INLINE ChainBlock chain_block(const ChainParams &p, Place place, int32_t number, void *memory) {
  ChainBlock b;
  b.pitch = pitch(p), b.thread = place.thread;
  const int32_t all = p.slot[p.count + 1] * b.pitch;
  b.weights = static_cast<float *>(memory);
  b.d = b.weights + p.weight_room;
  b.a = b.d + all;
  b.losses = b.a + all;
  b.c = b.losses + (kChainThreads + kLossLanes) * p.count; // all from here on is the backward's alone
  b.u = b.c + kMostLayers;
  b.g = b.u + all;
  b.bias_sums = b.g + all;
  b.begin = (place.block + int64_t{number} * p.blocks) * p.tile;
  const int64_t left = p.rows - b.begin;
  b.rows = static_cast<int32_t>(left < p.tile ? left : p.tile);
  return b;
}

// φ of what the layer below gives, which acts on a_m.
RACECAR_INLINE const ChainActivation &below(const ChainParams &p, int32_t m) {
  return m == 0 ? p.input : p.layers[m - 1].latent;
}

// The source of layer m's reverse.
RACECAR_INLINE const float *source(const ChainParams &p, const ChainBlock &b, int32_t m) {
  return (p.full && m + 1 < p.count ? b.a : b.d) + p.slot[m + 1] * b.pitch;
}

RACECAR_INLINE const float *bias_of(const ChainParams &p, const ChainBlock &b, int32_t m) {
  return b.weights + p.layers[m].weight_at + padded(p.width[m]) * padded(p.width[m + 1]);
}

// ------------------------------------------------------------------------------------------- memory

template <class S> RACECAR_INLINE void load_weights(const ChainParams &p, const ChainBlock &b) {
  RACECAR_ROLLED
  for (int32_t m = 0; m < p.count; ++m) {
    const ChainLayer &l = p.layers[m];
    const int32_t in = p.width[m], out = p.width[m + 1], columns = padded(in), rows = padded(out);
    float *const to = b.weights + l.weight_at;
    const S *const from = static_cast<const S *>(l.weight), *const bias = static_cast<const S *>(l.bias);
    RACECAR_ROLLED
    for (int32_t item = b.thread; item < rows * (columns + 1); item += kChainThreads) {
      const int32_t o = item / columns, i = item - o * columns, o_bias = item - rows * columns;
      float value = 0;
      if (o_bias >= 0)
        value = bias != nullptr && o_bias < out ? Storage<S>::load(bias[o_bias * l.bias_stride]) : 0.0f;
      else if (o < out && i < in)
        value = Storage<S>::load(from[o * l.weight_stride[0] + i * l.weight_stride[1]]);
      to[item] = value;
    }
  }
}

// Rows of a matrix, of which each has `apart` numbers and `features` of them are wanted. null: zeros.
template <class S>
RACECAR_INLINE void load_rows(const ChainParams &p, const ChainBlock &b, const void *from, int64_t apart,
                              int32_t features, float *to) {
  const int32_t all = padded(features);
  const S *const first = from == nullptr ? nullptr : static_cast<const S *>(from) + b.begin * apart;
  RACECAR_ROLLED
  for (int32_t item = b.thread; item < p.tile * all; item += kChainThreads) {
    const int32_t row = item / all, f = item - row * all;
    const int64_t at = (row < b.rows ? row : b.rows - 1) * apart + f;
    to[f * b.pitch + row] = first != nullptr && f < features ? Storage<S>::load(first[at]) : 0.0f;
  }
}

template <class S>
RACECAR_INLINE void store_rows(const ChainBlock &b, const float *from, int64_t apart, int32_t features, void *to) {
  S *const first = static_cast<S *>(to) + b.begin * apart;
  RACECAR_ROLLED
  for (int32_t item = b.thread; item < b.rows * features; item += kChainThreads) {
    const int32_t row = item / features, f = item - row * features;
    first[row * apart + f] = Storage<S>::store(from[f * b.pitch + row]);
  }
}

// ------------------------------------------------------------------------------------------- units

// Four features × four rows.
struct ChainUnit {
  int32_t feature, row;
};

RACECAR_INLINE int32_t units(const ChainParams &p, int32_t m) { return (padded(p.width[m]) / 4) << p.tile_shift; }

RACECAR_INLINE ChainUnit unit_at(const ChainParams &p, int32_t number) {
  return {(number >> p.tile_shift) * 4, (number & ((1 << p.tile_shift) - 1)) * 4};
}

// A unit's numbers, [feature][row].
struct ChainTile {
  float v[4][4];
};

RACECAR_INLINE ChainTile load_unit(const ChainBlock &b, const float *from, ChainUnit at) {
  ChainTile tile;
  RACECAR_UNROLLED
  for (int j = 0; j < 4; ++j) {
    const Floats<4> row = *reinterpret_cast<const Floats<4> *>(from + (at.feature + j) * b.pitch + at.row);
    RACECAR_UNROLLED
    for (int r = 0; r < 4; ++r)
      tile.v[j][r] = row.v[r];
  }
  return tile;
}

// Zeros for features that are padding; and, for gradients, for rows behind the batch.
RACECAR_INLINE void store_unit(const ChainBlock &b, float *to, ChainUnit at, int32_t features, int32_t rows,
                               const ChainTile &tile) {
  RACECAR_UNROLLED
  for (int j = 0; j < 4; ++j) {
    Floats<4> row;
    RACECAR_UNROLLED
    for (int r = 0; r < 4; ++r)
      row.v[r] = at.feature + j < features && at.row + r < rows ? tile.v[j][r] : 0.0f;
    *reinterpret_cast<Floats<4> *>(to + (at.feature + j) * b.pitch + at.row) = row;
  }
}

// acc += W in, or Wᵀ in where `transposed`, of layer m; minus: in - bias, rounded, stands for in.
template <class S, bool transposed, bool minus>
RACECAR_INLINE void add_product(const ChainParams &p, const ChainBlock &b, int32_t m, const float *in, ChainUnit at,
                                ChainTile &acc) {
  const int32_t columns = padded(p.width[m]), sums = transposed ? padded(p.width[m + 1]) : columns;
  const float *const weight = b.weights + p.layers[m].weight_at, *const bias = bias_of(p, b, m);
  RACECAR_ROLLED
  for (int32_t k = 0; k < sums; k += 4) {
    Floats<4> w[4];
    RACECAR_UNROLLED
    for (int q = 0; q < 4; ++q)
      w[q] = *reinterpret_cast<const Floats<4> *>(
          weight + (transposed ? (k + q) * columns + at.feature : (at.feature + q) * columns + k));
    ChainTile x = load_unit(b, in, {k, at.row});
    RACECAR_UNROLLED
    for (int q = 0; q < 4; ++q) {
      RACECAR_UNROLLED
      for (int r = 0; r < 4; ++r)
        x.v[q][r] = minus ? rounded_to<S>(x.v[q][r] - bias[k + q]) : x.v[q][r];
      RACECAR_UNROLLED
      for (int j = 0; j < 4; ++j) {
        RACECAR_UNROLLED
        for (int r = 0; r < 4; ++r)
          acc.v[j][r] = muladd(transposed ? w[q].v[j] : w[j].v[q], x.v[q][r], acc.v[j][r]);
      }
    }
  }
}

template <class S> RACECAR_INLINE void activate_unit(const ChainActivation &by, ChainTile &tile) {
  const racecar::cuda::Params<float> own = {by.p[0], by.p[1], by.p[2]};
  with_constant(static_cast<Act>(by.act), [&](auto tag) {
    RACECAR_UNROLLED
    for (int i = 0; i < 16; ++i)
      tile.v[i / 4][i % 4] = rounded_to<S>(activate<decltype(tag)::act>(tile.v[i / 4][i % 4], own));
  });
}

// ------------------------------------------------------------------------------------------- forth and back

// d_{m+1} = latent(W d_m + b).
template <class S> RACECAR_INLINE void step_forward(const ChainParams &p, const ChainBlock &b, int32_t m) {
  const float *const bias = bias_of(p, b, m);
  RACECAR_ROLLED
  for (int32_t number = b.thread; number < units(p, m + 1); number += kChainThreads) {
    const ChainUnit at = unit_at(p, number);
    ChainTile acc;
    RACECAR_UNROLLED
    for (int i = 0; i < 16; ++i)
      acc.v[i / 4][i % 4] = bias[at.feature + i / 4];
    add_product<S, false, false>(p, b, m, b.d + p.slot[m] * b.pitch, at, acc);
    activate_unit<S>(p.layers[m].latent, acc);
    store_unit(b, b.d + p.slot[m + 1] * b.pitch, at, p.width[m + 1], p.tile, acc);
  }
}

// a_m = φ_{m-1}(Wᵀ (source - b)), and this thread's part of Σ (d_m - a_m)².
template <class S> RACECAR_INLINE void step_reverse(const ChainParams &p, const ChainBlock &b, int32_t m) {
  float squares = 0;
  RACECAR_ROLLED
  for (int32_t number = b.thread; number < units(p, m); number += kChainThreads) {
    const ChainUnit at = unit_at(p, number);
    ChainTile acc = {};
    add_product<S, true, true>(p, b, m, source(p, b, m), at, acc);
    activate_unit<S>(below(p, m), acc);
    store_unit(b, b.a + p.slot[m] * b.pitch, at, p.width[m], p.tile, acc);
    const ChainTile d = load_unit(b, b.d + p.slot[m] * b.pitch, at);
    RACECAR_UNROLLED
    for (int i = 0; i < 16; ++i) {
      const float off = d.v[i / 4][i % 4] - acc.v[i / 4][i % 4];
      squares += at.feature + i / 4 < p.width[m] && at.row + i % 4 < b.rows ? off * off : 0.0f;
    }
  }
  if (p.layers[m].compare)
    b.losses[m * kChainThreads + b.thread] += squares;
}

// The steps of a reverse: a layer waits for the one above it only where the reverse is full.
RACECAR_INLINE int32_t reverse_steps(const ChainParams &p) { return p.full ? p.count : 1; }

template <class S> RACECAR_INLINE void step_back(const ChainParams &p, const ChainBlock &b, int32_t step) {
  const int32_t last = p.count - 1 - step, first = p.full ? last : 0;
  RACECAR_ROLLED
  for (int32_t m = last; m >= first; --m)
    if (p.layers[m].reversed)
      step_reverse<S>(p, b, m);
}

// Each thread's own, which no other one reads before the end.
RACECAR_INLINE void clear_losses(const ChainParams &p, const ChainBlock &b) {
  for (int32_t m = 0; m < p.count; ++m)
    b.losses[m * kChainThreads + b.thread] = 0;
}

// The losses of a block in two steps, always in the same order.
RACECAR_INLINE void add_losses(const ChainParams &p, const ChainBlock &b, int64_t block, int32_t step) {
  float *const lanes = b.losses + kChainThreads * p.count;
  const int32_t each = kChainThreads / kLossLanes, number = step == 0 ? p.count * kLossLanes : p.count;
  if (b.thread >= number)
    return;
  const float *const from = step == 0 ? b.losses + b.thread * each : lanes + b.thread * kLossLanes;
  float total = 0;
  for (int32_t k = 0; k < (step == 0 ? each : kLossLanes); ++k)
    total += from[k];
  if (step == 0)
    lanes[b.thread] = total;
  else
    p.loss_partials[block * p.count + b.thread] = total;
}

} // namespace cuda
} // namespace racecar
