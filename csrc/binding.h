// What the files that include PyTorch add to the module of extension.cpp.
#pragma once

#include <pybind11/pybind11.h>

void bind_pointwise(pybind11::module_ &module);
void bind_linear_chain(pybind11::module_ &module);
void bind_tape(pybind11::module_ &module);

// The level of SIMD instructions in use, of those that pointwise.h lists.
const char *simd_level_name();
