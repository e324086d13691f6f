// The compiled half of racecar_kernels. Only this file and *_binding.cpp include PyTorch; kernels do not.
//
// What it says about itself tells how it was built, so that a missing OpenMP or another PyTorch's headers show up in
// `racecar_kernels.show_config()` and not as a slow or crashing kernel later on.

#include "binding.h"

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#ifndef RACECAR_FLAGS
#define RACECAR_FLAGS "unknown"
#endif

namespace {

const char *compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// OpenMP's date, 0 without it: at::parallel_for in code compiled without OpenMP runs on one thread, silently.
constexpr long openmp() {
#if defined(_OPENMP)
  return _OPENMP;
#else
  return 0;
#endif
}

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["torch"] = TORCH_VERSION; // PyTorch's headers at compile time, without the local tag (+cpu)
  facts["compiler"] = compiler();
  facts["cxx"] = static_cast<long>(__cplusplus);
  facts["flags"] = RACECAR_FLAGS;
  facts["openmp"] = openmp();
  facts["threads"] = at::get_num_threads();
  return facts;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of racecar_kernels; loaded by racecar_kernels.extension.";
  module.def("build_facts", &build_facts, "How this module was built, and the number of threads it would use now.");
  bind_pointwise(module);
  bind_linear_chain(module);
  bind_tape(module);
}
