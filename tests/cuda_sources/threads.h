// What tests/cuda_host.py asks of every library: how the threads of a step are to run, and how many bytes they raced
// for.
#pragma once

#include "../../csrc/cuda/host_launch.h"

extern "C" {

void run_threads(int how) { racecar::cuda::host_threads = static_cast<racecar::cuda::HostThreads>(how); }

int64_t races() {
  const int64_t found = racecar::cuda::host_races;
  racecar::cuda::host_races = 0;
  return found;
}
}
