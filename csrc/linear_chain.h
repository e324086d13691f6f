// A chain of small linear layers, forward and reverse: plain data for the kernels of linear_chain.inl, and the table
// through which they are called. What is computed is said in racecar_kernels/linear_chain.py.
//
// No PyTorch here. What has to fit is checked by the binding before.
#pragma once

#include "pointwise.h"

namespace racecar {

// The batch is worked on in blocks of so many rows, in the first- and second-level cache: there a feature's values lie
// side by side, and the rows of a block are what runs in parallel within a register.
constexpr int64_t kChainRows = 64;

struct Elementwise {
  Act act;
  double p[3];
};

// Layer m: d_{m+1} = latent(weight d_m + bias). weight, (out, in), and bias, or null, are dense and in the type that is
// computed in: double for float64, else float.
struct LinearLayer {
  const void *weight, *bias;
  int64_t in, out;
  int64_t d;      // features of all d before d_m
  int64_t kept_a; // features of all kept a before a_m
  int64_t params; // weights and biases of all layers before this one
  Elementwise latent;
  bool compare, reversed; // whether its loss counts; whether its reverse runs
  bool needs_weight;
};

// Rows are those of matrices (rows, features) in the tensors' own type. What is kept lies block by block as it is in
// the cache: [feature][row]. A chunk is a run of blocks; what it sums belongs to it, so that results do not depend on
// the number of threads.
struct LinearChainJob {
  const LinearLayer *layers;
  int64_t count;
  Elementwise input; // acts on a_1
  bool full;
  int64_t rows, chunk_rows, chunks;
  int64_t features, kept_d, kept_a; // of all d; of the kept d_2 .. d_n; of the kept a
  int64_t widest, params;
  const void *x;
  void *out;
  void *d, *a;    // what is kept, or null: written by forward, read by backward
  double *losses; // per chunk: one for each layer; null: not wanted (backward) or no reverse (forward)
  // backward alone
  const void *grad_out; // or null
  const double *twice;  // twice the gradient of each loss, or null
  void *grad_x;         // or null
  double *grads;        // per chunk: each layer's weight, then its bias
};

// scratch: chain_scratch(...) bytes.
using ChainKernel = void (*)(const LinearChainJob &job, int64_t chunk, void *scratch);

struct ChainKernels {
  ChainKernel forward, backward;
};

constexpr int64_t kChainVector = 64; // bytes of the widest register

// `size`: bytes of a number of the type that is computed in.
inline int64_t chain_scratch(const LinearChainJob &job, int64_t size, bool backward) {
  const int64_t rows = (2 * job.features + 4 * job.widest) * kChainRows * size;
  return rows + (backward ? job.params * kChainVector : 0) + kChainVector;
}

// The same kernels, compiled for one level of SIMD instructions.
struct ChainLevel {
  const char *name; // as that of pointwise.h
  ChainKernels of_type[kTypes];
};

extern const ChainLevel baseline_chain_level;
#if defined(RACECAR_X86_LEVELS)
extern const ChainLevel avx2_chain_level;
extern const ChainLevel avx512_chain_level;
#endif

} // namespace racecar
