// The forward of a chain of linear layers, with its reverse: output, losses, and what is kept.
#pragma once

#include "linear_chain_rows.cuh"

namespace racecar {
namespace cuda {

template <class S> struct ChainForward {
  using Params = ChainParams;
  struct Thread {};
  static constexpr int threads = kChainThreads, resident = kChainBlocks;

  static int64_t blocks(const Params &p) { return p.blocks; }
  static int64_t shared(const Params &p) { return chain_shared(p, p.tile, false); }
  // Of a tile: it is read, goes forth and back, and is written.
  static RACECAR_INLINE int32_t each(const Params &p) { return p.count + 2 + (p.wants_losses ? reverse_steps(p) : 0); }
  static RACECAR_INLINE int steps(const Params &p) { return p.tiles_each * each(p) + (p.wants_losses ? 2 : 0); }

  static RACECAR_INLINE void step(const Params &p, int step, Place place, void *memory, Thread &) {
    const int32_t number = step / each(p), part = step - number * each(p);
    const ChainBlock b = chain_block(p, place, number, memory);
    if (number == p.tiles_each) {
      add_losses(p, b, place.block, part);
      return;
    }
    if (step == 0) {
      load_weights<S>(p, b);
      clear_losses(p, b);
    }
    if (b.rows <= 0)
      return;
    if (part == 0)
      load_rows<S>(p, b, p.x, p.width[0], p.width[0], b.d);
    else if (part <= p.count)
      step_forward<S>(p, b, part - 1);
    else if (part < each(p) - 1)
      step_back<S>(p, b, part - 1 - p.count);
    else
      keep(p, b);
  }

  static RACECAR_INLINE void keep(const Params &p, const ChainBlock &b) {
    const int32_t outs = p.width[p.count];
    store_rows<S>(b, b.d + p.slot[p.count] * b.pitch, outs, outs, p.out);
    RACECAR_ROLLED
    for (int32_t m = 0; m < p.count; ++m) {
      const ChainLayer &l = p.layers[m];
      if (p.keeps && m > 0)
        store_rows<S>(b, b.d + p.slot[m] * b.pitch, p.kept_d, p.width[m], static_cast<S *>(p.d) + l.kept_d);
      if (p.a != nullptr && l.reversed)
        store_rows<S>(b, b.a + p.slot[m] * b.pitch, p.kept_a, p.width[m], static_cast<S *>(p.a) + l.kept_a);
    }
  }
};

} // namespace cuda
} // namespace racecar
