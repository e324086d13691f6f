// What makes one source a CUDA kernel and, compiled for the host, a function that a test runs on the CPU.
//
// A kernel is a struct of static functions. Its work is cut into steps; between two steps all threads of a block meet.
//
//   struct Kernel {
//     using Params = ...;                         // plain data
//     struct Thread { ... };                      // what a thread keeps in registers from step to step
//     static constexpr int threads = 256;         // of a block
//     static constexpr int resident = 4;          // blocks that a multiprocessor has registers for; 2 where not said
//     static int64_t blocks(const Params &);      // of the grid, on the host
//     static int64_t shared(const Params &);      // bytes of shared memory, on the host
//     static int steps(const Params &);           // on both sides
//     static void step(const Params &, int step, Place, void *shared, Thread &);
//   };
//
// Within a step a thread neither reads nor writes shared memory that another one writes: the host runs the threads one
// after the other (host_launch.h), in orders that show who does.
// For the same reason there are no shuffles and no atomics; sums go through shared memory, always in the same order.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define RACECAR_INLINE __host__ __device__ __forceinline__
#define RACECAR_ROLLED _Pragma("unroll 1")
#define RACECAR_UNROLLED _Pragma("unroll")
#else
#define RACECAR_INLINE inline __attribute__((always_inline))
#define RACECAR_ROLLED   // before a loop whose body is not to be repeated
#define RACECAR_UNROLLED // before one that is: what it indexes is in registers
#endif
#define RACECAR_FMA 1 // every GPU has it; on the host __builtin_fma rounds once as well

#include "../pointwise.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>
#else
#include "host_launch.h"
#endif

namespace racecar {
namespace cuda {

#include "../pointwise_math.inl"

// IEEE's half precision, as bits: the host has no such type everywhere.
struct fp16 {
  uint16_t bits;
};

#if !defined(__CUDA_ARCH__)
inline float float_of_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) // infinity, NaN
    return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers as well
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
}

inline uint16_t half_of_float(float x) { // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (size > 0x7f800000u)
    return 0x7fffu;
  if (size >= 0x477ff000u) // 65520 and above round to infinity
    return static_cast<uint16_t>(sign | 0x7c00u);
  if (size < 0x38800000u) // subnormal: adding 0.5 leaves the number's units of 2^-24 in the last bits, rounded
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13));
}
#endif

template <> struct Storage<fp16> {
  using T = float;
#if defined(__CUDA_ARCH__)
  static RACECAR_INLINE float load(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
  static RACECAR_INLINE fp16 store(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
#else
  static RACECAR_INLINE float load(fp16 x) { return float_of_half(x.bits); }
  static RACECAR_INLINE fp16 store(float x) { return {half_of_float(x)}; }
#endif
};

// As a tensor of the type would hold it.
template <class S> RACECAR_INLINE float rounded_to(float x) { return Storage<S>::load(Storage<S>::store(x)); }

// Numbers that are moved at once.
template <int N> struct alignas(4 * N) Floats {
  float v[N];
};

// The types of a tensor that the kernels are compiled for.
enum class Number : int { float32, bfloat16, float16 };

// Calls f with a value of the type, so that the choice is made on the host.
template <class F> auto with_number(Number number, F f) {
  switch (number) {
  case Number::bfloat16:
    return f(bf16{});
  case Number::float16:
    return f(fp16{});
  default:
    return f(float{});
  }
}

// Where a thread is: 64 bits, since a grid times a block may exceed 32.
struct Place {
  int64_t block;
  int thread;
};

#if defined(__CUDACC__)

// Blocks that are to run on a multiprocessor at a time, which bounds their registers. Two, where a kernel does not say:
// left to itself, ptxas makes room for three on sm_100, and spills for it.
template <class Kernel, class = void> constexpr int resident = 2;
template <class Kernel> constexpr int resident<Kernel, std::void_t<decltype(Kernel::resident)>> = Kernel::resident;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, resident<Kernel>)
    run(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(16) unsigned char shared[];
  typename Kernel::Thread thread{};
  const Place place{static_cast<int64_t>(blockIdx.x), static_cast<int>(threadIdx.x)};
  const int steps = Kernel::steps(params);
  for (int i = 0; i < steps; ++i) {
    if (i > 0)
      __syncthreads();
    Kernel::step(params, i, place, shared, thread);
  }
}

// The error of the launch, cudaSuccess if there is nothing to do.
template <class Kernel> cudaError_t launch(const typename Kernel::Params &params, cudaStream_t stream) {
  const int64_t blocks = Kernel::blocks(params), shared = Kernel::shared(params);
  if (blocks <= 0)
    return cudaSuccess;
  if (blocks > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) { // beyond that a kernel has to ask
    const cudaError_t error =
        cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess)
      return error;
  }
  run<Kernel><<<static_cast<unsigned>(blocks), Kernel::threads, static_cast<std::size_t>(shared), stream>>>(params);
  return cudaGetLastError();
}

#endif

} // namespace cuda
} // namespace racecar
