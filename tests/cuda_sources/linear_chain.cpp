// csrc/cuda/linear_chain_*.cuh on the host, called by tests/cuda_chain.py in the order of linear_chain_binding.cpp.
#include "../../csrc/cuda/linear_chain_backward.cuh"
#include "../../csrc/cuda/linear_chain_forward.cuh"
#include "../../csrc/cuda/linear_chain_sums.cuh"
#include "threads.h"

using namespace racecar::cuda;

extern "C" {

int64_t size_of_parameters() { return sizeof(ChainParams); }

// From the counts, the widths and the layers' flags.
void arrange_chain(ChainParams *p) { arrange(*p); }

void activation_of(int number, int act, const double *parameters, ChainActivation *to) {
  *to = chain_activation(static_cast<Number>(number), act, parameters);
}

int64_t shared_bytes(const ChainParams *p) { return chain_shared(*p, kLeastTile, true); }

int cut_chain(ChainParams *p, int64_t most_shared, int64_t multiprocessors, int one) {
  return cut(*p, most_shared, static_cast<int32_t>(multiprocessors)) && (!one || cut_into_one(*p));
}

int64_t room_for_partials(const ChainParams *p, int backward) { return partial_numbers(*p, backward); }

// partials: so many numbers. Returns the bytes of shared memory that a block took.
int64_t run_chain(int number, int backward, ChainParams *p, float *partials) {
  int64_t shared = 0;
  place_partials(*p, backward, partials);
  with_number(static_cast<Number>(number), [&](auto of) {
    using S = decltype(of);
    if (backward) {
      shared = ChainBackward<S>::shared(*p);
      launch<ChainBackward<S>>(*p);
      launch<ChainSums<S, true>>(*p);
    } else {
      shared = ChainForward<S>::shared(*p);
      launch<ChainForward<S>>(*p);
      launch<ChainSums<S, false>>(*p);
    }
  });
  return shared;
}
}
