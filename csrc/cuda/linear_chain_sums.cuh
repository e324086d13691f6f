// What the blocks of a chain of linear layers summed, added up in a fixed order: losses, and the gradients of weights
// and biases in their parameters' type and layout.
#pragma once

#include "linear_chain.h"

namespace racecar {
namespace cuda {

template <class S, bool backward> struct ChainSums {
  using Params = ChainParams;
  struct Thread {};
  static constexpr int threads = 256, lanes = 16, items = threads / lanes; // of a block
  // Items: first the losses, then every weight, then every bias.
  static RACECAR_INLINE int32_t losses(const Params &p) { return p.wants_losses ? p.count : 0; }
  static RACECAR_INLINE int32_t count(const Params &p) { return losses(p) + (backward ? p.weights + p.biases : 0); }

  static int64_t blocks(const Params &p) { return (count(p) + items - 1) / items; }
  static int64_t shared(const Params &) { return int64_t{4} * threads; }
  static RACECAR_INLINE int steps(const Params &) { return 2; }

  static RACECAR_INLINE void step(const Params &p, int step, Place place, void *memory, Thread &) {
    const int32_t lane = place.thread / items, own = place.thread % items;
    const int64_t item = place.block * items + own;
    float *const partials = static_cast<float *>(memory);
    if (item >= count(p))
      return;
    if (step == 0) {
      partials[place.thread] = sum(p, static_cast<int32_t>(item), lane);
    } else if (lane == 0) {
      float total = 0;
      for (int k = 0; k < lanes; ++k)
        total += partials[k * items + own];
      write(p, static_cast<int32_t>(item), total);
    }
  }

  // Every `lanes`-th number of an item. Those of no wanted gradient were never written.
  static RACECAR_INLINE float sum(const Params &p, int32_t item, int32_t lane) {
    const float *from = p.loss_partials;
    int32_t apart = p.count;
    int64_t rows = p.blocks;
    if (item >= losses(p)) {
      item -= losses(p);
      const bool weight = item < p.weights;
      from = weight ? p.weight_partials : p.bias_partials;
      apart = weight ? p.weights : p.biases;
      rows *= weight ? p.splits : 1;
      item -= weight ? 0 : p.weights;
    }
    float total = 0;
    for (int64_t row = lane; row < rows; row += lanes)
      total += from[row * apart + item];
    return total;
  }

  static RACECAR_INLINE void write(const Params &p, int32_t item, float total) {
    if (item < losses(p)) {
      p.losses[item] = total;
      return;
    }
    item -= losses(p);
    const bool weight = item < p.weights;
    item -= weight ? 0 : p.weights;
    int32_t m = 0;
    while (m + 1 < p.count && item >= (weight ? p.layers[m + 1].weights : p.layers[m + 1].biases))
      ++m;
    const ChainLayer &l = p.layers[m];
    item -= weight ? l.weights : l.biases;
    if (!weight && l.grad_bias != nullptr)
      static_cast<S *>(l.grad_bias)[item * l.grad_bias_stride] = Storage<S>::store(total);
    if (weight && l.grad_weight != nullptr) {
      const int32_t o = item / p.width[m], i = item - o * p.width[m];
      static_cast<S *>(l.grad_weight)[o * l.grad_weight_stride[0] + i * l.grad_weight_stride[1]] =
          Storage<S>::store(total);
    }
  }
};

} // namespace cuda
} // namespace racecar
