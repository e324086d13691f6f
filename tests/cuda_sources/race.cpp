// A kernel whose threads may race, by tests/test_cuda_host.py: what the host finds of that, and what it must not.
#include "../../csrc/cuda/portable.cuh"
#include "threads.h"

using namespace racecar::cuda;

namespace {

constexpr int kThreads = 4;

// In one step every thread writes; what is written comes out in the next one.
struct Race {
  struct Params {
    int32_t how; // 0: to its own place; 1: all add to one; 2: all read the first one's; 3: behind the end
    float *out;
  };
  struct Thread {};
  static constexpr int threads = kThreads;
  static int64_t blocks(const Params &) { return 1; }
  static int64_t shared(const Params &) { return sizeof(float) * kThreads; }
  static int steps(const Params &) { return 3; }
  static void step(const Params &p, int step, Place place, void *memory, Thread &) {
    float *const at = static_cast<float *>(memory);
    const int t = place.thread;
    if (step == 0)
      at[t] = 1;
    else if (step == 1 && p.how == 1)
      at[0] += static_cast<float>(t + 1);
    else if (step == 1 && p.how == 2)
      at[t] = t == 0 ? 5 : at[0];
    else if (step == 1)
      at[p.how == 3 ? kThreads + t : t] = 7;
    else
      p.out[t] = at[t];
  }
};

} // namespace

extern "C" void race(int64_t how, float *out) { launch<Race>({static_cast<int32_t>(how), out}); }
