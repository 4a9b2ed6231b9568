// What the distances share: packs that are kept in registers, and means per sample. A sample's
// elements are added up in chunks, one per block, and the chunks' sums in a second pass, in a fixed
// order; so the bits depend on the length of a chunk alone.
#pragma once

#include <cstring>

#include "../math/half.h"
#include "distances.h"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// A number of a vector of any dtype.
__device__ __forceinline__ float number(const View<1>& vector, int64_t index) {
  return load_one(vector.data, vector.dtype, vector.offset(index), 0.0f);
}

// Whether neighbours in dimension `inner` may be read as packs of N, at any index of a and b.
template <int kRank>
bool has_packs(const View<kRank>& view, int N, int inner, int a, int b) {
  return view.stride[inner] == 1 && view.size[inner] % N == 0 &&
         packs_are_aligned(view.data, view.dtype, N, view.stride[a], view.stride[b]);
}

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

struct Chunks {
  int64_t size, length, count;  // elements of a sample, of a chunk; chunks of a sample
  unsigned blocks;              // one per chunk of all samples
  float* partials;              // their sums
};

// The elements of a block.
struct Chunk {
  int64_t b, begin, end;

  __device__ __forceinline__ explicit Chunk(const Chunks& chunks)
      : b(blockIdx.x / chunks.count),
        begin(blockIdx.x % chunks.count * chunks.length),
        end(min(begin + chunks.length, chunks.size)) {}
};

// The sum of the block, of one value per warp.
template <typename Real>
__device__ __forceinline__ void store_partial(Real value, const Chunks& chunks) {
  __shared__ Real values[kWarps];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread % kWarpSize == 0) values[thread / kWarpSize] = value;
  __syncthreads();
  if (thread >= kWarpSize) return;
  const Real sum = warp_sum(thread < kWarps ? values[thread] : Real(0));
  if (thread == 0) chunks.partials[blockIdx.x] = float(sum);
}

struct One {
  __device__ double operator()(int64_t) const { return 1.0; }
};

// means[b] = the sum of the partial sums of b, divided by the size, times factor_of(b). A warp per
// sample: threadIdx.y is the sample.
template <typename FactorOf>
__global__ void __launch_bounds__(kThreads)
    chunk_means_kernel(const Chunks chunks, float* means, int64_t B, FactorOf factor_of) {
  const int64_t b = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (b >= B) return;  // the same for all threads of a warp
  // fp64: a handful of numbers, and one rounding less for each
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks.count; chunk += kWarpSize) {
    sum += chunks.partials[b * chunks.count + chunk];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) means[b] = float(sum / double(chunks.size) * factor_of(b));
}

// Returns what fn(chunks), which launches a kernel, returns.
template <typename Fn>
Status with_chunks(int64_t B, int64_t size, int64_t length, Fn fn) {
  const int64_t count = ceil_div(size, length);
  if (B * count == 0) return nullptr;  // no blocks would be an error
  if (B * count > kMaxBlocks) return "more chunks than a grid holds";
  return fn(Chunks{size, length, count, unsigned(B * count), nullptr});
}

// means (B,) of the partial sums that fn(chunks) launches a kernel for.
template <typename Fn, typename FactorOf = One>
Status chunk_means(const Dense& means, int64_t B, int64_t size, int64_t length, const Place& place,
                   Fn fn, FactorOf factor_of = {}) {
  return with_chunks(B, size, length, [&](Chunks chunks) -> Status {
    chunks.partials = place.scratch<float>(chunks.blocks);
    if (chunks.partials == nullptr) return kNoMemory;
    const Status status = fn(chunks);
    if (status != nullptr) return status;
    return launch(chunk_means_kernel<FactorOf>, unsigned(ceil_div(B, kWarps)),
                  dim3(kWarpSize, kWarps), place, chunks, means.as<float>(), B, factor_of);
  });
}

// Calls fn(T{}) with the element type of the first tensor unless the arguments are wrong.
template <typename Arguments, typename Fn>
Status checked(const Arguments& a, DType first, Fn fn) {
  const Status status = a.check();
  if (status != nullptr) return status;
  constexpr Status kDouble = "tensors must be float32, bfloat16 or float16 on CUDA";
  return a.stats() == DType::kFloat64 ? kDouble : with_element_type(first, kDouble, fn);
}

}  // namespace
}  // namespace pixelgen::cuda
