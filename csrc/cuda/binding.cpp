// The CUDA half of racecar_kernels. Only this file and *_binding.cpp include PyTorch; kernels do not, and compile in
// seconds beside any of its versions.

#include "binding.h"

#include <torch/version.h>

#ifndef RACECAR_CODES
#define RACECAR_CODES "unknown"
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

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["torch"] = TORCH_VERSION; // PyTorch's headers at compile time, without the local tag (+cu130)
  facts["cuda"] = pybind11::make_tuple(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  // what the GPU code was compiled for: sm_90 is a chip's own instructions, compute_120 PTX, for later ones
  facts["codes"] = pybind11::tuple(pybind11::str(RACECAR_CODES).attr("split")(","));
  facts["compiler"] = compiler(); // of the host's half
  facts["cxx"] = static_cast<long>(__cplusplus);
  return facts;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "CUDA kernels of racecar_kernels; loaded by racecar_kernels.extension. Importing it needs no GPU.";
  module.def("build_facts", &build_facts, "How this module was built.");
  bind_few_channels(module);
  bind_fold(module);
  bind_linear_chain(module);
}
