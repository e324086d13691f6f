// csrc/cuda/few_channels_*.cuh on the host, called by tests/test_cuda_few_channels.py.
#include "../../csrc/cuda/few_channels_narrow.cuh"
#include "../../csrc/cuda/few_channels_weight.cuh"
#include "../../csrc/cuda/few_channels_wide.cuh"
#include "threads.h"

#include <cstddef>
#include <initializer_list>
#include <type_traits>

using namespace racecar::cuda;

namespace {

template <class F> void with_any(int kernel, int number, int few, F f) {
  if (kernel == 0)
    with_few<Narrow>(static_cast<Number>(number), few, f);
  else if (kernel == 1)
    with_few<Wide>(static_cast<Number>(number), few, f);
  else
    with_few<WeightSums>(static_cast<Number>(number), few, f);
}

} // namespace

extern "C" {

int64_t size_of_parameters() { return sizeof(FewParams); }

// Of every field of a struct, in the order of racecar_kernels/cuda/parameters.py.
#define AT(field) static_cast<int64_t>(offsetof(S, field))
void offsets_of_source(int64_t *to) {
  using S = FewSource;
  for (int64_t at : {AT(x), AT(scale), AT(shift), AT(batch), AT(p), AT(act), AT(done), AT(unused)})
    *to++ = at;
}

void offsets_of_operand(int64_t *to) {
  using S = FewOperand;
  for (int64_t at : {AT(x), AT(d), AT(minus), AT(c2), AT(g), AT(g_batch), AT(incoming), AT(unused)})
    *to++ = at;
}

void offsets_of_epilogue(int64_t *to) {
  using S = FewEpilogue;
  for (int64_t at : {AT(d), AT(scale), AT(shift), AT(minus), AT(out), AT(source), AT(squares), AT(sums), AT(p), AT(act),
                     AT(keep_u), AT(window), AT(d_size), AT(unused)})
    *to++ = at;
}

void offsets_of_parameters(int64_t *to) {
  using S = FewParams;
  for (int64_t at :
       {AT(many), AT(few),       AT(to),           AT(weight), AT(weight_stride), AT(partials), AT(images),   AT(tiles),
        AT(each), AT(many_size), AT(few_size),     AT(kernel), AT(stride),        AT(padding),  AT(dilation), AT(tile),
        AT(rect), AT(channels),  AT(few_is_large), AT(wide),   AT(lanes),         AT(rows),     AT(unused)})
    *to++ = at;
}
#undef AT

// kernel: 0 narrow, 1 wide, 2 weight.
void few_channels(int kernel, int number, int few, const FewParams *p) {
  with_any(kernel, number, few, [&](auto *of) { launch<std::remove_pointer_t<decltype(of)>>(*p); });
}

int64_t shared_bytes(int kernel, int number, int few, const FewParams *p) {
  int64_t found = 0;
  with_any(kernel, number, few, [&](auto *of) { found = of->shared(*p); });
  return found;
}
}
