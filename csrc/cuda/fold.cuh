// The folded weight of a transposed convolution whose source is repeated by whole factors, and its adjoint:
//
//   W_f[t] = Σ_{i < f} W[t - i]            k + f - 1 taps from k
//   ∂W[t]  = Σ_{i < f} ∂W_f[t + i]         k taps from k + f - 1
//
// in both directions of the image at once. One number for a thread; what is summed is float32.
#pragma once

#include "portable.cuh"

namespace racecar {
namespace cuda {

// Of (outputs, inputs, rows, columns); strides in numbers. The result has fewer than 2^31 of them.
struct FoldParams {
  const void *from;
  void *to;
  int64_t from_stride[4], to_stride[4];
  uint32_t size[4]; // of the result
  int32_t from_size[2];
  int32_t factor[2];
};

// adjoint: of the gradient. From: how numbers are read, To: how they are written.
template <class From, class To, bool adjoint> struct Fold {
  using Params = FoldParams;
  struct Thread {};
  static constexpr int threads = 256;

  static int64_t count(const Params &p) { return int64_t{p.size[0]} * p.size[1] * p.size[2] * p.size[3]; }
  static int64_t blocks(const Params &p) { return (count(p) + threads - 1) / threads; }
  static int64_t shared(const Params &) { return 0; }
  static RACECAR_INLINE int steps(const Params &) { return 1; }

  static RACECAR_INLINE void step(const Params &p, int, Place place, void *, Thread &) {
    uint32_t rest = static_cast<uint32_t>(place.block) * threads + static_cast<uint32_t>(place.thread);
    int32_t at[4];
    for (int i = 3; i >= 0; --i) {
      at[i] = static_cast<int32_t>(rest % p.size[i]);
      rest /= p.size[i];
    }
    if (rest > 0) // beyond the last number
      return;
    const From *const from = static_cast<const From *>(p.from) + at[0] * p.from_stride[0] + at[1] * p.from_stride[1];
    float sum = 0;
    for (int32_t i = 0; i < p.factor[0]; ++i)
      for (int32_t j = 0; j < p.factor[1]; ++j) {
        const int32_t row = adjoint ? at[2] + i : at[2] - i, column = adjoint ? at[3] + j : at[3] - j;
        if (row >= 0 && row < p.from_size[0] && column >= 0 && column < p.from_size[1])
          sum += Storage<From>::load(from[row * p.from_stride[2] + column * p.from_stride[3]]);
      }
    static_cast<To *>(
        p.to)[at[0] * p.to_stride[0] + at[1] * p.to_stride[1] + at[2] * p.to_stride[2] + at[3] * p.to_stride[3]] =
        Storage<To>::store(sum);
  }
};

} // namespace cuda
} // namespace racecar
