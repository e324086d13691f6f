// The pointwise family: plain data for the kernels of pointwise.inl, and the table through which they are called.
//
// No PyTorch here. A tensor is a pointer into a grid; what has to fit is checked by the binding before.
#pragma once

#include <cstdint>

#if defined(RACECAR_INLINE) // cuda/portable.cuh has its own
#elif defined(_MSC_VER)
#define RACECAR_INLINE __forceinline
#else
#define RACECAR_INLINE inline __attribute__((always_inline)) // a loop with a call left in it is not vectorised
#endif

namespace racecar {

// Activations that are differentiable from their output. Each with its parameters p:
//   clamp        max(p0, min(p1, u)); relu is p0 = 0 and p1 = NaN, which no number is above
//   leaky_relu   u > 0 ? u : p0 * u
//   elu          u > 0 ? p1 * u : p0 * expm1(p2 * u)
enum class Act : int { identity, clamp, leaky_relu, elu, tanh, sigmoid, softsign };
constexpr int kActs = 7;

enum class Type : int { float32, float64, bfloat16 };
constexpr int kTypes = 3;

// act(x * scale[c] + shift[c]), rounded to x's type. scale, shift and mean are in the type that is computed in: double
// for float64, else float. Without shift there is no affine; without scale it is 1. done: x holds the result already,
// and the activation matters to gradients alone. mean: what is taken off x in the sum Σ g·(x - mean); null is 0.
struct Lazy {
  const void *x;
  const void *scale;
  const void *shift;
  const void *mean;
  Act act;
  bool done;
  double p[3];
};

// Memory of the full size as [outer][height][width][inner], of the pooled size as [outer][h][w][inner].
// channels_last: inner is the channel. Contiguous: inner is 1, outer the batch times the channels.
// A tile is one row of windows, `columns` windows wide: rows of contiguous memory that stay in the first-level cache.
// Where the window does not divide the image, the last tiles take the rest. A block is a run of tiles; what it sums
// belongs to the block, so that results do not depend on the number of threads.
struct Grid {
  int64_t outer, height, width, inner, channels;
  int64_t kh, kw; // the pooling's window, 1 and 1 without
  int64_t h, w;
  int64_t columns, tiles; // windows of a tile, tiles side by side
  int64_t per_block, blocks;
  int64_t rows, row; // most rows of a tile, most elements of its row
  int64_t apart;     // elements from a tile's first to its last, were it cut out of an image as wide
  int64_t scratch;   // bytes that a kernel needs for itself
};

// What the convolution that gives d.x reads, and how: channels innermost. Its weight and the gradient of that are
// [taps][channels][channels of c], a tap the row and the column in the kernel.
struct Image {
  const void *x; // padded, in the type that is computed in
  int64_t channels, height, width;
  int64_t rows, columns; // of c
  int64_t kernel[2], stride[2], dilation[2];
  int64_t weights;   // taps · channels · channels of c
  double *gradients; // per block: that many sums; null: not wanted
  const void *weight,
      *bias; // in Lazy's type, to compute d.x where it is read; null: d.x is in memory, there is no bias
};

struct Job {
  Grid grid;
  Lazy d, a;          // at full and at pooled size; a.x may be null
  const void *g;      // incoming gradient at the size of the result, or null
  const void *pooled; // incoming gradient at pooled size, or null
  bool loss;          // whether c2 is given
  double c2;
  void *out, *out_pooled; // null where not wanted
  const void *k[4];       // values per channel
  double *partials;       // per block: two sums for every channel
  double *squares;        // per block: one number
  Image image;
};

using Kernel = void (*)(const Job &job, int64_t block, void *scratch);

struct Kernels {
  Kernel sums;           // d.x, k[0] or null          -> partials: Σ (x - k0), Σ (x - k0)² (zeros without k0)
  Kernel materialise;    // d, k[0] or null            -> out = d - k0, out_pooled
  Kernel sum_of_squares; // d, a, k[0] or null         -> squares: Σ (d - undo(a))²; out = a - k0 where wanted
  Kernel grad_reverse;   // d, a, g, c2                -> out; partials, where wanted: Σ g, Σ g·(x - mean); squares
  Kernel grad_forward;   // d, a, g, pooled, c2        -> out, or image.gradients; partials, where wanted, as above
  Kernel combine;        // g, d.x, k[0..3]            -> out = k0·g + k1·(x - k3) + k2
};

// One level of SIMD instructions: the same kernels, compiled for it.
struct Level {
  const char *name;
  Kernels of_type[kTypes];
};

extern const Level baseline_level;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define RACECAR_X86_LEVELS 1
extern const Level avx2_level;
extern const Level avx512_level;
#endif

} // namespace racecar
