// Convolutions between an image of few channels (1 to 4) and one of many: plain data for the kernels of
// few_channels_*.cuh. racecar_kernels/cuda/parameters.py holds the same fields in the same order.
//
// W is (many, few, rows, columns) here, whichever of the two the operation reads. Images are channels_last with dense
// pixels, batches may lie apart. A tap t of W joins pixel `large` of the operation's input with pixel `small` of its
// output where large = small · stride - padding + t · dilation.
#pragma once

#include <cstdint>

namespace racecar {
namespace cuda {

// act(x · scale[c] + shift[c]), rounded to x's type; `done`: x itself. batch: numbers from one image to the next.
struct FewSource {
  const void *x;
  const float *scale, *shift;
  int64_t batch;
  float p[3];
  int32_t act, done;
  int32_t unused; // fills the last eight bytes
};

// x - minus[c]; or, as `incoming`, act'(x) · (g + c2 · (x - d)), g alone without x. Rounded to the images' type.
struct FewOperand {
  FewSource x, d;
  const float *minus, *c2;
  const void *g;
  int64_t g_batch;
  int32_t incoming, unused;
};

// What becomes of a sum u: a = act(u · scale + shift), rounded; out = u or a; source = a - minus;
// squares[block] = Σ (d - undo(a))², d having `window` pixels for each of a, and the rest belongs to the last window;
// sums[tile, channel] = Σ u.
struct FewEpilogue {
  FewSource d;
  const float *scale, *shift, *minus;
  void *out, *source;
  float *squares, *sums;
  float p[3];
  int32_t act, keep_u;
  int32_t window[2], d_size[2];
  int32_t unused;
};

struct FewParams {
  FewOperand many, few; // what is read; of the result, the sizes alone
  FewEpilogue to;
  const void *weight;
  int64_t weight_stride[4];
  float *partials; // of the weight's gradient: [row][many][few][tap]
  int64_t images, tiles[2], each;
  int32_t many_size[2], few_size[2]; // rows, columns
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t tile[2], rect[2]; // pixels of a block's result, and at most of what it reads
  int32_t channels;         // many
  int32_t few_is_large;     // whether the few channels are those of the operation's input
  int32_t wide;             // whether 16 bytes of channels can be read and written at once
  int32_t lanes;            // threads beside each other that share a pixel
  int32_t rows, unused;     // rows of partials
};

} // namespace cuda
} // namespace racecar
