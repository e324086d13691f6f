// Runs a kernel of portable.cuh on the host, for tests: blocks one after the other, in every step the threads one after
// the other. Shared memory has the bytes that the kernel asks for and no more, and begins as NaN, as what it forgot to
// write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace racecar {
namespace cuda {

// How the threads of a step run; what a kernel gives depends on it only if they race.
enum class HostThreads : int {
  in_order,
  last_first, // a thread that reads what another one writes reads the other value
  alone,      // each sees the memory from before the step, and bytes that two of them change are counted
};
static HostThreads host_threads = HostThreads::in_order;
static int64_t host_races = 0; // bytes so far that two threads have changed within a step

// One step in which every thread is alone.
template <class Step> void step_alone(unsigned char *shared, std::size_t bytes, int threads, Step &&step) {
  const std::vector<unsigned char> before(shared, shared + bytes);
  std::vector<unsigned char> after(before), changed(bytes, 0);
  for (int t = 0; t < threads; ++t) {
    std::memcpy(shared, before.data(), bytes);
    step(t);
    if (std::memcmp(shared, before.data(), bytes) == 0)
      continue;
    for (std::size_t i = 0; i < bytes; ++i)
      if (shared[i] != before[i]) {
        host_races += changed[i];
        changed[i] = 1, after[i] = shared[i];
      }
  }
  std::memcpy(shared, after.data(), bytes);
}

template <class Kernel> void launch(const typename Kernel::Params &params) {
  constexpr std::align_val_t aligned{16};
  const auto bytes = static_cast<std::size_t>(Kernel::shared(params));
  auto *const shared = static_cast<unsigned char *>(::operator new(bytes, aligned));
  const auto threads = std::make_unique<typename Kernel::Thread[]>(Kernel::threads);
  for (int64_t block = 0, blocks = Kernel::blocks(params); block < blocks; ++block) {
    std::memset(shared, 0xff, bytes);
    for (int t = 0; t < Kernel::threads; ++t)
      threads[static_cast<std::size_t>(t)] = {};
    for (int step = 0; step < Kernel::steps(params); ++step) {
      const auto one = [&](int t) {
        Kernel::step(params, step, {block, t}, shared, threads[static_cast<std::size_t>(t)]);
      };
      if (host_threads == HostThreads::alone)
        step_alone(shared, bytes, Kernel::threads, one);
      else
        for (int t = 0; t < Kernel::threads; ++t)
          one(host_threads == HostThreads::in_order ? t : Kernel::threads - 1 - t);
    }
  }
  ::operator delete(shared, aligned);
}

} // namespace cuda
} // namespace racecar
