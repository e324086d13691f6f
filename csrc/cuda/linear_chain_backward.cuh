// The backward of a chain of linear layers: gradients of x, and for every block its sums for weights and biases.
//
// With c_m twice the gradient of loss m, g(m) what d_m receives, behind its activation's derivative, and u(m) what
// Wᵀ (source - b) receives:
//
//   u(m) = φ'_{m-1}(a_m) (c_m (a_m - d_m) + [full] W_{m-1} u(m-1))
//   g(m) = φ'_{m-1}(d_m) (Wᵀ_m g(m+1) + c_m (d_m - a_m) + [local, or the last one] W_{m-1} u(m-1))
//   ∂W_m = g(m+1) d_mᵀ + (source - b) u(m)ᵀ,   ∂b_m = Σ g(m+1) - Σ W_m u(m)
//
// The sums of weights lie in global memory, where a block adds to what is its own: in shared memory they would take as
// much room again as the weights.
#pragma once

#include "linear_chain_rows.cuh"

namespace racecar {
namespace cuda {

template <class S> struct ChainBackward {
  using Params = ChainParams;
  struct Thread {};
  static constexpr int threads = kChainThreads, resident = kChainBlocks;

  static RACECAR_INLINE bool has_c(const Params &p) { return p.grad_losses != nullptr; }
  static int64_t blocks(const Params &p) { return p.blocks; }
  static int64_t shared(const Params &p) { return chain_shared(p, p.tile, true); }

  // Steps of a tile, in their order: what is read; the forward and the reverse where they were not kept; all u; g from
  // the last to the first; the sums.
  struct Schedule {
    int32_t forward, reverse, up, down, sums, all;
  };
  static RACECAR_INLINE Schedule schedule(const Params &p) {
    Schedule s;
    s.forward = 1;
    s.reverse = s.forward + (p.keeps ? 0 : p.count);
    s.up = s.reverse + (has_c(p) && p.a == nullptr ? reverse_steps(p) : 0);
    s.down = s.up + (has_c(p) ? reverse_steps(p) : 0);
    s.sums = s.down + p.count + 1;
    s.all = s.sums + 1;
    return s;
  }
  static RACECAR_INLINE int steps(const Params &p) { return p.tiles_each * schedule(p).all + (p.wants_losses ? 2 : 1); }

  static RACECAR_INLINE void step(const Params &p, int step, Place place, void *memory, Thread &) {
    const Schedule s = schedule(p);
    const int32_t number = step / s.all, part = step - number * s.all;
    const ChainBlock b = chain_block(p, place, number, memory);
    if (number == p.tiles_each) {
      finish(p, b, place.block, part);
      return;
    }
    if (step == 0)
      begin(p, b);
    if (b.rows <= 0)
      return;
    if (part == 0)
      recall(p, b);
    else if (part < s.reverse)
      step_forward<S>(p, b, part - s.forward);
    else if (part < s.up)
      step_back<S>(p, b, part - s.reverse);
    else if (part < s.down)
      up(p, b, part - s.up);
    else if (part < s.sums)
      down(p, b, p.count - (part - s.down));
    else
      add_sums(p, b, place.block, number == 0);
  }

  static RACECAR_INLINE int32_t bias_numbers(const Params &p) {
    return (p.slot[p.count + 1] - p.slot[1]) << p.tile_shift;
  }

  static RACECAR_INLINE void begin(const Params &p, const ChainBlock &b) {
    load_weights<S>(p, b);
    clear_losses(p, b);
    for (int32_t i = b.thread; i < bias_numbers(p); i += threads)
      b.bias_sums[i] = 0;
    if (has_c(p) && b.thread < p.count)
      b.c[b.thread] = p.layers[b.thread].compare ? 2 * p.grad_losses[b.thread] : 0.0f;
  }

  static RACECAR_INLINE void recall(const Params &p, const ChainBlock &b) {
    const int32_t outs = p.width[p.count];
    float *const last = b.d + p.slot[p.count] * b.pitch;
    load_rows<S>(p, b, p.x, p.width[0], p.width[0], b.d);
    load_rows<S>(p, b, p.grad_out, outs, outs, b.g + p.slot[p.count] * b.pitch);
    if (p.keeps)
      load_rows<S>(p, b, p.out, outs, outs, last);
    RACECAR_ROLLED
    for (int32_t m = 0; m < p.count; ++m) {
      const ChainLayer &l = p.layers[m];
      if (p.keeps && m > 0)
        load_rows<S>(p, b, static_cast<const S *>(p.d) + l.kept_d, p.kept_d, p.width[m], b.d + p.slot[m] * b.pitch);
      if (p.a != nullptr && has_c(p) && l.reversed)
        load_rows<S>(p, b, static_cast<const S *>(p.a) + l.kept_a, p.kept_a, p.width[m], b.a + p.slot[m] * b.pitch);
    }
  }

  // acc += c_m (a_m - d_m), or the negative of it.
  static RACECAR_INLINE void add_residual(const Params &p, const ChainBlock &b, int32_t m, float sign, ChainUnit at,
                                          ChainTile &acc) {
    const float c = sign * b.c[m];
    const ChainTile a = load_unit(b, b.a + p.slot[m] * b.pitch, at), d = load_unit(b, b.d + p.slot[m] * b.pitch, at);
    RACECAR_UNROLLED
    for (int i = 0; i < 16; ++i)
      acc.v[i / 4][i % 4] = muladd(c, a.v[i / 4][i % 4] - d.v[i / 4][i % 4], acc.v[i / 4][i % 4]);
  }

  // acc *= φ', from what φ gave.
  static RACECAR_INLINE void differentiate_unit(const ChainBlock &b, const ChainActivation &by, const float *result,
                                                ChainUnit at, ChainTile &acc) {
    const ChainTile of = load_unit(b, result, at);
    const racecar::cuda::Params<float> own = {by.p[0], by.p[1], by.p[2]};
    with_constant(static_cast<Act>(by.act), [&](auto tag) {
      RACECAR_UNROLLED
      for (int i = 0; i < 16; ++i)
        acc.v[i / 4][i % 4] = differentiate<decltype(tag)::act>(acc.v[i / 4][i % 4], of.v[i / 4][i % 4], own);
    });
  }

  // ∂b_m += sign · Σ over rows, in a place that belongs to the unit.
  static RACECAR_INLINE void add_bias(const Params &p, const ChainBlock &b, int32_t m, float sign, ChainUnit at,
                                      const ChainTile &acc) {
    RACECAR_UNROLLED
    for (int j = 0; j < 4; ++j) {
      float total = 0;
      RACECAR_UNROLLED
      for (int r = 0; r < 4; ++r)
        total += at.row + r < b.rows ? acc.v[j][r] : 0.0f;
      const int32_t feature = p.slot[m + 1] - p.slot[1] + at.feature + j;
      b.bias_sums[(feature << p.tile_shift) + at.row / 4] += sign * total;
    }
  }

  // u of one layer, in a full reverse; else of all at once.
  static RACECAR_INLINE void up(const Params &p, const ChainBlock &b, int32_t step) {
    RACECAR_ROLLED
    for (int32_t m = p.full ? step : 0; m < (p.full ? step + 1 : p.count); ++m) {
      if (!p.layers[m].reversed)
        continue;
      RACECAR_ROLLED
      for (int32_t number = b.thread; number < units(p, m); number += threads) {
        const ChainUnit at = unit_at(p, number);
        ChainTile acc = {};
        if (p.full && m > 0) {
          add_product<S, false, false>(p, b, m - 1, b.u + p.slot[m - 1] * b.pitch, at, acc);
          add_bias(p, b, m - 1, -1, at, acc);
        }
        if (p.layers[m].compare) // 0 · (a_m - d_m) is no zero where one of them is infinite
          add_residual(p, b, m, 1, at, acc);
        differentiate_unit(b, below(p, m), b.a + p.slot[m] * b.pitch, at, acc);
        store_unit(b, b.u + p.slot[m] * b.pitch, at, p.width[m], b.rows, acc);
      }
    }
  }

  // g(m); of x without a derivative, and only where it is wanted.
  static RACECAR_INLINE void down(const Params &p, const ChainBlock &b, int32_t m) {
    if (m == 0 && p.grad_x == nullptr)
      return;
    const bool last = m == p.count;
    const bool reverse = has_c(p) && m > 0 && (p.full ? last : p.layers[m - 1].reversed != 0);
    float *const g = b.g + p.slot[m] * b.pitch;
    RACECAR_ROLLED
    for (int32_t number = b.thread; number < units(p, m); number += threads) {
      const ChainUnit at = unit_at(p, number);
      ChainTile acc = {};
      if (reverse) {
        add_product<S, false, false>(p, b, m - 1, b.u + p.slot[m - 1] * b.pitch, at, acc);
        add_bias(p, b, m - 1, -1, at, acc);
      }
      if (last) {
        const ChainTile given = load_unit(b, g, at);
        RACECAR_UNROLLED
        for (int i = 0; i < 16; ++i)
          acc.v[i / 4][i % 4] += given.v[i / 4][i % 4];
      } else {
        add_product<S, true, false>(p, b, m, b.g + p.slot[m + 1] * b.pitch, at, acc);
        if (has_c(p) && p.layers[m].compare)
          add_residual(p, b, m, -1, at, acc);
      }
      if (m > 0) {
        differentiate_unit(b, p.layers[m - 1].latent, b.d + p.slot[m] * b.pitch, at, acc);
        add_bias(p, b, m - 1, 1, at, acc);
      }
      store_unit(b, g, at, p.width[m], b.rows, acc);
    }
  }

  // ------------------------------------------------------------------ sums

  // Gradients of all weights, a unit being four outputs × four inputs over one split's share of the rows; and of x.
  static RACECAR_INLINE void add_sums(const Params &p, const ChainBlock &b, int64_t block, bool first) {
    if (p.grad_x != nullptr)
      store_rows<S>(b, b.g, p.width[0], p.width[0], p.grad_x);
    int32_t unit = b.thread;
    RACECAR_ROLLED
    for (int32_t m = 0; m < p.count; ++m) {
      if (p.layers[m].grad_weight == nullptr)
        continue;
      const int32_t outs = padded(p.width[m + 1]) / 4, ins = padded(p.width[m]) / 4, here = outs * ins * p.splits;
      RACECAR_ROLLED
      for (; unit < here; unit += threads) {
        const int32_t split = unit & (p.splits - 1), pair = unit / p.splits, o = pair / ins, i = pair - o * ins;
        correlate(p, b, m, o, i, split, p.weight_partials + (block * p.splits + split) * p.weights, first);
      }
      unit -= here;
    }
  }

  // A thread's features lie apart, its neighbour's beside them: so they are read from different banks.
  static RACECAR_INLINE void correlate(const Params &p, const ChainBlock &b, int32_t m, int32_t o, int32_t i,
                                       int32_t split, float *sums, bool first) {
    const int32_t ins = p.width[m], outs = p.width[m + 1], next_o = padded(outs) / 4, next_i = padded(ins) / 4;
    const bool reverse = has_c(p) && p.layers[m].reversed;
    const float *const bias = bias_of(p, b, m);
    ChainTile acc = {}; // [output][input]
    RACECAR_ROLLED
    for (int32_t row = 4 * split; row < b.rows; row += 4 * p.splits) {
      add_rows<S, false>(b, b.g + p.slot[m + 1] * b.pitch + row, o, next_o, bias, b.d + p.slot[m] * b.pitch + row, i,
                         next_i, acc);
      if (reverse)
        add_rows<S, true>(b, source(p, b, m) + row, o, next_o, bias, b.u + p.slot[m] * b.pitch + row, i, next_i, acc);
    }
    RACECAR_UNROLLED
    for (int k = 0; k < 16; ++k) {
      const int32_t output = o + k / 4 * next_o, input = i + k % 4 * next_i;
      if (output >= outs || input >= ins)
        continue;
      float *const to = sums + p.layers[m].weights + output * ins + input;
      *to = first ? acc.v[k / 4][k % 4] : *to + acc.v[k / 4][k % 4];
    }
  }

  // acc[o][i] += Σ over four rows of left[o] · right[i].
  template <class Of, bool minus>
  static RACECAR_INLINE void add_rows(const ChainBlock &b, const float *left, int32_t o, int32_t next_o,
                                      const float *bias, const float *right, int32_t i, int32_t next_i,
                                      ChainTile &acc) {
    Floats<4> x[4];
    RACECAR_UNROLLED
    for (int k = 0; k < 4; ++k)
      x[k] = *reinterpret_cast<const Floats<4> *>(right + (i + k * next_i) * b.pitch);
    RACECAR_UNROLLED
    for (int j = 0; j < 4; ++j) {
      const int32_t feature = o + j * next_o;
      const Floats<4> y = *reinterpret_cast<const Floats<4> *>(left + feature * b.pitch);
      RACECAR_UNROLLED
      for (int r = 0; r < 4; ++r) {
        const float value = minus ? rounded_to<Of>(y.v[r] - bias[feature]) : y.v[r];
        RACECAR_UNROLLED
        for (int k = 0; k < 4; ++k)
          acc.v[j][k] = muladd(value, x[k].v[r], acc.v[j][k]);
      }
    }
  }

  // What the block found for biases and losses.
  static RACECAR_INLINE void finish(const Params &p, const ChainBlock &b, int64_t block, int32_t step) {
    if (p.wants_losses)
      add_losses(p, b, block, step);
    if (step > 0)
      return;
    RACECAR_ROLLED
    for (int32_t m = 0; m < p.count; ++m) {
      const float *const from = b.bias_sums + ((p.slot[m + 1] - p.slot[1]) << p.tile_shift);
      for (int32_t o = b.thread; o < p.width[m + 1]; o += threads) {
        float total = 0;
        for (int32_t quad = 0; quad < 1 << p.tile_shift; ++quad)
          total += from[(o << p.tile_shift) + quad];
        p.bias_partials[block * p.biases + p.layers[m].biases + o] = total;
      }
    }
  }
};

} // namespace cuda
} // namespace racecar
