// What the distances share: packs that are kept in registers, and the second pass of a mean per
// sample, which adds the sums of its chunks in a fixed order.
#pragma once

#include <cstring>

#include "../math/half.h"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

// N neighbours as they came. As elements, two bytes of each would take a register.
template <typename T, int N>
struct Held {
  static constexpr int kWords = N * sizeof(T) / 4;
  Pack<uint32_t, kWords> words;

  __device__ __forceinline__ void fetch(const T* source) {
    words = *reinterpret_cast<const Pack<uint32_t, kWords>*>(source);
  }
  // Zeros unless `is_inside`.
  __device__ __forceinline__ void fetch_if(bool is_inside, const T* source) {
    if (is_inside) {
      fetch(source);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words.values[i] = 0;
    }
  }
  // Makes later values anew: kept as fp32, those of half precision take twice the registers.
  __device__ __forceinline__ void forget_values() {
    if constexpr (sizeof(T) < 4) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(words.values[i]));
    }
  }
  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(T) == 4) {
      return math::float_of(words.values[i]);
    } else {
      const uint32_t word = words.values[i / 2];
      const uint16_t bits = uint16_t(i % 2 == 0 ? word : word >> 16);
      return half_value(bits, T{});
    }
  }

 private:
  static __device__ __forceinline__ float half_value(uint16_t bits, __nv_bfloat16) {
    return math::float_of(uint32_t(bits) << 16);
  }
  static __device__ __forceinline__ float half_value(uint16_t bits, __half value) {
    memcpy(&value, &bits, sizeof(value));
    return to_float(value);
  }
};

constexpr int kMeanThreads = 256;

// A warp per sample: threadIdx.y is the sample.
__global__ void __launch_bounds__(kMeanThreads)
    chunk_means_kernel(const float* partials, float* means, int64_t B, int64_t chunks,
                       int64_t size) {
  const int64_t b = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (b >= B) return;  // the same for all threads of a warp
  // fp64: a handful of numbers, and one rounding less for each
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kWarpSize) {
    sum += partials[b * chunks + chunk];
  }
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  }
  if (threadIdx.x == 0) means[b] = float(sum / double(size));
}

// means (B,) = partials (B, chunks), added up and divided by `size`.
inline Status launch_chunk_means(const void* partials, void* means, int64_t B, int64_t chunks,
                                 int64_t size, cudaStream_t stream) {
  constexpr int kSamples = kMeanThreads / kWarpSize;
  return launch(chunk_means_kernel, unsigned(ceil_div(B, kSamples)), dim3(kWarpSize, kSamples),
                stream, static_cast<const float*>(partials), static_cast<float*>(means), B, chunks,
                size);
}

}  // namespace
}  // namespace pixelgen::cuda
