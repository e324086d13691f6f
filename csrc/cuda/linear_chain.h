// A chain of narrow linear layers, forward and reverse, in one launch per direction: plain data for the kernels of
// linear_chain_*.cuh, and how a launch is cut into blocks. What is computed is said in racecar_kernels/linear_chain.py.
//
// The structs of ../linear_chain.h are not these: a launch takes its parameters by value, 4 KB at most, reads weights
// where they lie, and computes in float32 alone. The activations are the same (../pointwise.h).
#pragma once

#include "portable.cuh"

namespace racecar {
namespace cuda {

constexpr int kMostWidth = 512;
constexpr int kMostLayers = 16;
constexpr int kChainThreads = 128;
constexpr int kChainBlocks = 4; // at a time on a multiprocessor: 128 registers for each of their threads
constexpr int kLossLanes = 8;   // threads that add up the losses of a layer, 16 · 8 in all
constexpr int kMostTile = 64, kLeastTile = 8;
constexpr int kMostSplits = 8;

struct ChainActivation {
  float p[3];
  int32_t act;
};

// Layer m: d_{m+1} = latent(weight d_m + bias), weight (out, in). Strides in numbers.
struct ChainLayer {
  const void *weight, *bias;     // bias: or null
  void *grad_weight, *grad_bias; // or null: not wanted
  int64_t weight_stride[2], bias_stride, grad_weight_stride[2], grad_bias_stride;
  ChainActivation latent;
  int32_t compare, reversed; // whether its loss counts; whether its reverse runs
  // filled by arrange():
  int32_t weight_at;       // its place in shared memory; the bias lies behind it
  int32_t kept_d, kept_a;  // features before d_m and a_m in a row of what is kept
  int32_t weights, biases; // numbers of all layers before, in the sums
  int32_t unused;
};

struct ChainParams {
  ChainLayer layers[kMostLayers];
  ChainActivation input; // acts on a_1
  const void *x;         // (rows, features) of the first layer, dense, as are all others
  void *out;
  void *d, *a; // kept d_2 .. d_n and a of all layers that run backwards, side by side, or null
  float *losses;
  const void *grad_out;     // or null
  const float *grad_losses; // or null
  void *grad_x;             // or null
  // sums of every block, added up by the launch that follows
  float *loss_partials, *weight_partials, *bias_partials;
  int64_t rows;
  int32_t count, full;
  int32_t wants_losses; // forward: whether the reverse runs; backward: whether its losses are new
  int32_t keeps;        // whether d is given: it has no numbers where there is one layer
  // filled by arrange():
  int32_t width[kMostLayers + 1]; // of d_1 .. d_{n+1}; given
  int32_t slot[kMostLayers + 2];  // padded features before them, and all of them at the end
  int32_t kept_d, kept_a;         // features of a kept row
  int32_t weights, biases;        // numbers in all layers
  int32_t weight_room;            // of all weights and biases in shared memory
  int32_t tile;                   // rows
  int32_t tile_shift;             // 2^shift quads of rows
  int32_t splits;                 // of a tile's rows, each of which sums weight gradients for itself
  int32_t blocks, tiles_each;     // of a launch; tiles that a block goes through at most
};

RACECAR_INLINE int32_t padded(int32_t features) { return (features + 3) / 4 * 4; }

// From a feature to the next one: an odd number of quads, so that neighbours lie in different banks.
RACECAR_INLINE int32_t pitch(const ChainParams &p) { return p.tile + 4; }

// The parameters of an activation as the kernels take them, for tensors of a type.
inline ChainActivation chain_activation(Number number, int32_t act, const double *p) {
  ChainActivation own{};
  own.act = act;
  with_number(number, [&](auto of) {
    const racecar::cuda::Params<float> as = rounded<decltype(of)>(static_cast<Act>(act), p);
    own.p[0] = as.p0, own.p[1] = as.p1, own.p[2] = as.p2;
  });
  return own;
}

// Bytes of shared memory of a block with `tile` rows.
inline int64_t chain_shared(const ChainParams &p, int32_t tile, bool backward) {
  const int64_t features = p.slot[p.count + 1], pitch = tile + 4;
  int64_t numbers = p.weight_room + 2 * features * pitch + int64_t{kChainThreads + kLossLanes} * p.count;
  if (backward)
    numbers += kMostLayers + 2 * features * pitch + (features - p.slot[1]) * (tile / 4);
  return 4 * numbers;
}

// Where everything lies: from widths, count and which layers run backwards.
inline void arrange(ChainParams &p) {
  int32_t room = 0, slot = 0, kept_a = 0, weights = 0, biases = 0;
  p.kept_d = 0;
  for (int32_t m = 0; m < p.count; ++m) {
    ChainLayer &l = p.layers[m];
    const int32_t in = p.width[m], out = p.width[m + 1];
    l.weight_at = room, l.weights = weights, l.biases = biases, l.kept_a = kept_a, l.kept_d = p.kept_d;
    room += padded(out) * padded(in) + padded(out);
    weights += in * out, biases += out;
    kept_a += l.reversed ? in : 0, p.kept_d += m > 0 ? in : 0;
    p.slot[m] = slot;
    slot += padded(in);
  }
  p.slot[p.count] = slot;
  p.slot[p.count + 1] = slot + padded(p.width[p.count]);
  p.weight_room = room, p.kept_a = kept_a, p.weights = weights, p.biases = biases;
}

// How many blocks, and how many tiles for each of them. False where one would take too many steps.
inline bool spread(ChainParams &p, int64_t most_blocks) {
  const int64_t tiles = (p.rows + p.tile - 1) / p.tile, blocks = tiles < most_blocks ? tiles : most_blocks;
  const int64_t each = blocks > 0 ? (tiles + blocks - 1) / blocks : 0;
  if (blocks < 1 || each * (5 * p.count + 8) > INT32_MAX)
    return false;
  p.blocks = static_cast<int32_t>(blocks), p.tiles_each = static_cast<int32_t>(each);
  return true;
}

// Cuts an arranged job for a GPU with so many bytes of shared memory for a block. Rows are spread over all
// multiprocessors before tiles grow; forward and backward are cut alike. False where it does not fit.
inline bool cut(ChainParams &p, int64_t most_shared, int32_t multiprocessors) {
  p.tile = 0;
  for (int32_t tile = kLeastTile; tile <= kMostTile; tile *= 2)
    if (chain_shared(p, tile, true) <= most_shared && (p.tile == 0 || (p.rows + tile - 1) / tile >= multiprocessors))
      p.tile = tile;
  if (p.tile == 0)
    return false;
  p.tile_shift = 0;
  while (4 << p.tile_shift < p.tile)
    ++p.tile_shift;
  int32_t units = 0; // of the weights' gradients, without splits
  for (int32_t m = 0; m < p.count; ++m)
    units += padded(p.width[m]) / 4 * (padded(p.width[m + 1]) / 4);
  p.splits = 1;
  while (p.splits * 2 <= kMostSplits && p.splits * 2 <= p.tile / 4 && units * p.splits * 2 <= kChainThreads)
    p.splits *= 2;
  const int64_t fitting = most_shared / chain_shared(p, p.tile, true);
  return spread(p, multiprocessors * (fitting < kChainBlocks ? fitting : int64_t{kChainBlocks}));
}

// One block where there is no memory for the sums of many: slower, and the same numbers but for their order.
inline bool cut_into_one(ChainParams &p) {
  p.splits = 1;
  return spread(p, 1);
}

// Float32 numbers that the blocks' sums take, and where each kind of them lies.
inline int64_t partial_numbers(const ChainParams &p, bool backward) {
  const int64_t losses = p.wants_losses ? p.count : 0;
  return p.blocks * (losses + (backward ? int64_t{p.splits} * p.weights + p.biases : int64_t{0}));
}

inline void place_partials(ChainParams &p, bool backward, float *at) {
  p.loss_partials = at;
  p.bias_partials = at + (p.wants_losses ? int64_t{p.blocks} * p.count : int64_t{0});
  p.weight_partials = p.bias_partials + (backward ? int64_t{p.blocks} * p.biases : int64_t{0});
}

} // namespace cuda
} // namespace racecar
