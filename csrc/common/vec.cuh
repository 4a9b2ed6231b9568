// 128-bit loads and stores of any dtype as fp32, and how kernels are started.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "op.h"

namespace pixelgen::cuda {

constexpr int kWarpSize = 32;

// N neighbouring elements, moved in accesses of up to 16 bytes. Its address must be a multiple of
// alignof(Pack).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(double value) { return float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ void from_float(float value, float* out) { *out = value; }
__device__ __forceinline__ void from_float(float value, double* out) { *out = double(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void from_float(float value, __half* out) {
  *out = __float2half_rn(value);
}

// N neighbours as fp32. kAligned: as one pack, and all N exist; else one by one, and those from
// `count` on become 0 (or are not stored): the way for odd widths and odd addresses.
template <int N, bool kAligned, typename T>
__device__ __forceinline__ void load(const T* source, int count, float (&out)[N]) {
  if constexpr (kAligned) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(source);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}

template <int N, bool kAligned, typename T>
__device__ __forceinline__ void store(const float (&in)[N], T* target, int count) {
  if constexpr (kAligned) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) from_float(in[i], &pack.values[i]);
    *reinterpret_cast<Pack<T, N>*>(target) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) from_float(in[i], &target[i]);
    }
  }
}

// The same for a buffer whose dtype is known at run time; `otherwise` N times when it is null. The
// branches are the same for all threads.
template <int N, bool kAligned>
__device__ __forceinline__ void load_as(const void* base, DType dtype, int64_t offset, int count,
                                        float otherwise, float (&out)[N]) {
  if (base == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = otherwise;
    return;
  }
  switch (dtype) {
    case DType::kFloat32:
      return load<N, kAligned>(static_cast<const float*>(base) + offset, count, out);
    case DType::kBFloat16:
      return load<N, kAligned>(static_cast<const __nv_bfloat16*>(base) + offset, count, out);
    case DType::kFloat16:
      return load<N, kAligned>(static_cast<const __half*>(base) + offset, count, out);
    case DType::kFloat64:
      return load<N, kAligned>(static_cast<const double*>(base) + offset, count, out);
  }
}

template <int N, bool kAligned>
__device__ __forceinline__ void store_as(const float (&in)[N], void* base, DType dtype,
                                         int64_t offset, int count) {
  switch (dtype) {
    case DType::kFloat32:
      return store<N, kAligned>(in, static_cast<float*>(base) + offset, count);
    case DType::kBFloat16:
      return store<N, kAligned>(in, static_cast<__nv_bfloat16*>(base) + offset, count);
    case DType::kFloat16:
      return store<N, kAligned>(in, static_cast<__half*>(base) + offset, count);
    case DType::kFloat64:
      return store<N, kAligned>(in, static_cast<double*>(base) + offset, count);
  }
}

// One element.
__device__ __forceinline__ float load_one(const void* base, DType dtype, int64_t offset,
                                          float otherwise) {
  float value[1];
  load_as<1, true>(base, dtype, offset, 1, otherwise, value);
  return value[0];
}

__device__ __forceinline__ void store_one(float value, void* base, DType dtype, int64_t offset) {
  const float values[1] = {value};
  store_as<1, true>(values, base, dtype, offset, 1);
}

template <typename Real>
__device__ __forceinline__ Real warp_sum(Real value) {
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, lane);
  }
  return value;
}

// Whether packs of `count` elements may be accessed at base + any combination of the strides (in
// elements).
inline bool packs_are_aligned(const void* base, DType dtype, int count, int64_t stride_a,
                              int64_t stride_b) {
  if (base == nullptr) return true;
  const int64_t size = element_size(dtype);
  const int64_t alignment = size * count < 16 ? size * count : 16;
  return reinterpret_cast<uintptr_t>(base) % alignment == 0 && stride_a * size % alignment == 0 &&
         stride_b * size % alignment == 0;
}

// The same along the last dimension, at any index of the others.
template <int kRank>
bool packs_are_aligned(const View<kRank>& view, int count) {
  const int64_t size = element_size(view.dtype);
  const int64_t alignment = size * count < 16 ? size * count : 16;
  bool are = view.stride[kRank - 1] == 1 && reinterpret_cast<uintptr_t>(view.data) % alignment == 0;
  for (int i = 0; i < kRank - 1; ++i) are = are && view.stride[i] * size % alignment == 0;
  return are;
}

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid's x dimension

// Calls fn(T{}) with the element type of a dtype of at most 32 bits and returns what it returns,
// or returns `otherwise`.
template <typename Fn>
Status with_element_type(DType dtype, Status otherwise, Fn fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kBFloat16:
      return fn(__nv_bfloat16{});
    case DType::kFloat16:
      return fn(__half{});
    default:
      return otherwise;
  }
}

// Starts a kernel: the one place that does, so that the same source runs where `<<<>>>` is no
// syntax.
template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Place& place,
              const Arguments&... arguments) {
#ifndef PIXELGEN_CUDA_EMULATION
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(place.stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else  // tests/cuda_emulation
  return cuda_emulation::launch(kernel, grid, block, arguments...);
#endif
}

// Makes the device of a place current for a scope: streams belong to a device, and launches need
// that one to be current.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Place& place) {
    int current = -1;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != place.device) {
      error = cudaSetDevice(place.device);
      if (error == cudaSuccess) previous_ = current;
    }
    if (error != cudaSuccess) status_ = cudaGetErrorString(error);
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  Status status() const { return status_; }

 private:
  int previous_ = -1;
  Status status_ = nullptr;
};

#undef PIXELGEN_GUARD
#define PIXELGEN_GUARD DeviceGuard

}  // namespace pixelgen::cuda
