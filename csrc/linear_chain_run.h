// A chain of linear layers over PyTorch's tensors: one call per direction.
#pragma once

#include "linear_chain.h"

#include <ATen/ATen.h>

#include <optional>
#include <utility>
#include <vector>

namespace racecar {

using MaybeTensor = std::optional<at::Tensor>;
using Gradients = std::vector<at::Tensor>; // undefined where not needed

// What a forward gives. Kept: d_2 .. d_n and a_1 .. a_n, each in one tensor (rows, features) whose values lie as the
// kernels have them; undefined where they are computed again.
struct ChainForward {
  at::Tensor out, losses, d, a;
};

struct ChainBackward {
  at::Tensor x;
  Gradients weights, biases;
  at::Tensor losses; // found here where the forward had not run the reverse
};

// What a backward is asked for.
struct ChainNeeds {
  bool x;
  std::vector<bool> weights, biases;
};

// The chain without its tensors. `latents` begins with what acts on a_1, then come φ_1 .. φ_n. No layer that it serves
// receives or gives more than `widest` features.
class LinearChain {
public:
  LinearChain(std::vector<Elementwise> latents, std::vector<bool> compare, bool full, int64_t widest)
      : latents_(std::move(latents)), compare_(std::move(compare)), full_(full), widest_(widest) {}

  // Whether forward and backward can take these: tensors of one type, on the CPU, of shapes that fit.
  bool serves(const at::Tensor &x, const Gradients &weights, const std::vector<MaybeTensor> &biases) const;

  ChainForward forward(const at::Tensor &x, const Gradients &weights, const std::vector<MaybeTensor> &biases,
                       bool store, bool reverse) const;

  // d and a as the forward gave them; `out` is read where d is given.
  ChainBackward backward(const MaybeTensor &grad_out, const MaybeTensor &grad_losses, const at::Tensor &x,
                         const Gradients &weights, const std::vector<MaybeTensor> &biases, const at::Tensor &out,
                         const MaybeTensor &d, const MaybeTensor &a, const ChainNeeds &needs) const;

private:
  friend class ChainCall;
  std::vector<Elementwise> latents_;
  std::vector<bool> compare_;
  bool full_;
  int64_t widest_;
};

} // namespace racecar
