// csrc/cuda/fold.cuh and the number types of portable.cuh on the host, called by tests/test_cuda_fold.py.
#include "../../csrc/cuda/fold.cuh"
#include "threads.h"

using namespace racecar::cuda;

extern "C" {

// Sizes are (outputs, inputs, rows, columns), strides in numbers. The adjoint reads float32.
void fold(int number, int adjoint, const void *from, const int64_t *from_size, const int64_t *from_stride, void *to,
          const int64_t *size, const int64_t *to_stride, const int64_t *factor) {
  FoldParams p{};
  p.from = from;
  p.to = to;
  for (int i = 0; i < 4; ++i) {
    p.from_stride[i] = from_stride[i];
    p.to_stride[i] = to_stride[i];
    p.size[i] = static_cast<uint32_t>(size[i]);
  }
  for (int i = 0; i < 2; ++i) {
    p.from_size[i] = static_cast<int32_t>(from_size[2 + i]);
    p.factor[i] = static_cast<int32_t>(factor[i]);
  }
  with_number(static_cast<Number>(number), [&](auto of) {
    if (adjoint)
      launch<Fold<float, decltype(of), true>>(p);
    else
      launch<Fold<decltype(of), decltype(of), false>>(p);
  });
}

void to_float(int number, const void *from, float *to, int64_t count) {
  with_number(static_cast<Number>(number), [&](auto of) {
    using S = decltype(of);
    for (int64_t i = 0; i < count; ++i)
      to[i] = Storage<S>::load(static_cast<const S *>(from)[i]);
  });
}

void from_float(int number, const float *from, void *to, int64_t count) {
  with_number(static_cast<Number>(number), [&](auto of) {
    using S = decltype(of);
    for (int64_t i = 0; i < count; ++i)
      static_cast<S *>(to)[i] = Storage<S>::store(from[i]);
  });
}
}
