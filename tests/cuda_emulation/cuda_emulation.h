// What the .cu files of csrc/ops use of CUDA, for g++: a test runs them on the CPU, where there is
// no GPU. Included before every .cu file. The threads of a block are fibers, so that barriers and
// shuffles are real; cuda_emulation.cpp watches every memory access of a kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

// A GPU has the fused multiply-add. Where csrc/math asks for it, libm answers, with the same bits.
#ifndef __FMA__
#define __FMA__ 1
#endif
#include "math/half.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // blocks run one after the other
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// --- types

#define CUDA_EMULATION_VECTORS(T, name)                                         \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                                \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }            \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
// clang-format off
CUDA_EMULATION_VECTORS(float, float)
CUDA_EMULATION_VECTORS(double, double)
CUDA_EMULATION_VECTORS(int, int)
CUDA_EMULATION_VECTORS(unsigned int, uint)
CUDA_EMULATION_VECTORS(unsigned char, uchar)
CUDA_EMULATION_VECTORS(unsigned short, ushort)
// clang-format on
#undef CUDA_EMULATION_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
using nv_bfloat16 = __nv_bfloat16;
using half = __half;
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

// --- the runtime

namespace cuda_emulation {

struct Builtins {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Builtins builtins;  // of the thread that runs

enum class WarpOp { kShuffle, kSync, kBallot, kAny, kAll };

// Waits for all threads of the block.
void wait_for_block(const char* file, int line);

// Waits for the lanes of `mask`, then gives what `source` passed as value (kShuffle), or what the
// votes say.
uint64_t wait_for_warp(WarpOp op, uint32_t mask, uint64_t value, int source, const char* file,
                       int line);
int lane();

using Call = void (*)(void* closure);

// Runs call(closure) once per thread. Null, or what went wrong.
const char* run(dim3 grid, dim3 block, Call call, void* closure);

// In place of kernel<<<grid, block, 0, stream>>>(arguments...).
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   const Arguments&... arguments) {
  auto call = [&] { kernel(arguments...); };
  using Closure = decltype(call);
  return run(grid, block, [](void* closure) { (*static_cast<Closure*>(closure))(); }, &call);
}

template <typename T>
T shuffle(uint32_t mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic_v<T>, "shuffles move numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = wait_for_warp(WarpOp::kShuffle, mask, bits, source, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

#define threadIdx (cuda_emulation::builtins.thread)
#define blockIdx (cuda_emulation::builtins.block)
#define blockDim (cuda_emulation::builtins.block_size)
#define gridDim (cuda_emulation::builtins.grid_size)
constexpr int warpSize = 32;

// --- barriers, shuffles, votes. The default arguments are the place of the call.

#define CUDA_EMULATION_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_EMULATION_PLACE) { cuda_emulation::wait_for_block(file, line); }

inline void __syncwarp(uint32_t mask = 0xffffffffu, CUDA_EMULATION_PLACE) {
  cuda_emulation::wait_for_warp(cuda_emulation::WarpOp::kSync, mask, 0, 0, file, line);
}

// Where the source lies outside of the lane's segment of `width`, the lane gets its own value.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, CUDA_EMULATION_PLACE) {
  const int first = cuda_emulation::lane() & ~(width - 1);
  return cuda_emulation::shuffle(mask, value, first | (source & (width - 1)), file, line);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, CUDA_EMULATION_PLACE) {
  const int lane = cuda_emulation::lane(), last = lane | (width - 1), source = lane ^ bits;
  return cuda_emulation::shuffle(mask, value, source <= last ? source : lane, file, line);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, CUDA_EMULATION_PLACE) {
  const int lane = cuda_emulation::lane(), last = lane | (width - 1), source = lane + delta;
  return cuda_emulation::shuffle(mask, value, source <= last ? source : lane, file, line);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, CUDA_EMULATION_PLACE) {
  const int lane = cuda_emulation::lane(), first = lane & ~(width - 1), source = lane - delta;
  return cuda_emulation::shuffle(mask, value, source >= first ? source : lane, file, line);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, CUDA_EMULATION_PLACE) {
  return uint32_t(cuda_emulation::wait_for_warp(cuda_emulation::WarpOp::kBallot, mask,
                                                predicate != 0, 0, file, line));
}
inline int __any_sync(uint32_t mask, int predicate, CUDA_EMULATION_PLACE) {
  return int(cuda_emulation::wait_for_warp(cuda_emulation::WarpOp::kAny, mask, predicate != 0, 0,
                                           file, line));
}
inline int __all_sync(uint32_t mask, int predicate, CUDA_EMULATION_PLACE) {
  return int(cuda_emulation::wait_for_warp(cuda_emulation::WarpOp::kAll, mask, predicate != 0, 0,
                                           file, line));
}

// --- arithmetic

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) ? T(b) : T(a);
}

inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline void __sincosf(float x, float* sin, float* cos) { *sin = std::sin(x), *cos = std::cos(x); }
inline void sincospif(float x, float* sin, float* cos) {
  const double angle = std::fmod(double(x), 2.0) * 3.14159265358979323846;
  *sin = float(std::sin(angle)), *cos = float(std::cos(angle));
}
inline void sincospi(double x, double* sin, double* cos) {
  const long double angle = std::fmod((long double)(x), 2.0L) * 3.141592653589793238462643L;
  *sin = double(std::sin(angle)), *cos = double(std::cos(angle));
}
inline float sinpif(float x) {
  float sin, cos;
  return sincospif(x, &sin, &cos), sin;
}
inline float cospif(float x) {
  float sin, cos;
  return sincospif(x, &sin, &cos), cos;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
inline int32_t __mulhi(int32_t a, int32_t b) { return int32_t((int64_t(a) * b) >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return uint64_t(((unsigned __int128)(a)*b) >> 64);
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename To, typename From>
To cuda_emulation_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline uint32_t __float_as_uint(float x) { return cuda_emulation_bits<uint32_t>(x); }
inline int32_t __float_as_int(float x) { return cuda_emulation_bits<int32_t>(x); }
inline float __uint_as_float(uint32_t x) { return cuda_emulation_bits<float>(x); }
inline float __int_as_float(int32_t x) { return cuda_emulation_bits<float>(x); }

inline float __bfloat162float(__nv_bfloat16 x) {
  return pixelgen::math::to_real<float>(pixelgen::math::BFloat16{x.bits});
}
inline float __half2float(__half x) {
  return pixelgen::math::to_real<float>(pixelgen::math::Float16{x.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  pixelgen::math::BFloat16 out;
  pixelgen::math::from_real(x, &out);
  return {out.bits};
}
inline __half __float2half_rn(float x) {
  pixelgen::math::Float16 out;
  pixelgen::math::from_real(x, &out);
  return {out.bits};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }

// Loads and stores with a cache hint.
#define CUDA_EMULATION_LOAD(name) \
  template <typename T>           \
  T name(const T* source) {       \
    return *source;               \
  }
#define CUDA_EMULATION_STORE(name) \
  template <typename T>            \
  void name(T* target, T value) {  \
    *target = value;               \
  }
// clang-format off
CUDA_EMULATION_LOAD(__ldg)
CUDA_EMULATION_LOAD(__ldcs)
CUDA_EMULATION_LOAD(__ldcg)
CUDA_EMULATION_LOAD(__ldca)
CUDA_EMULATION_LOAD(__ldlu)
CUDA_EMULATION_STORE(__stcs)
CUDA_EMULATION_STORE(__stcg)
CUDA_EMULATION_STORE(__stwb)
CUDA_EMULATION_STORE(__stwt)
// clang-format on
#undef CUDA_EMULATION_LOAD
#undef CUDA_EMULATION_STORE

// --- the host side: one device, number 0

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
using cudaStream_t = struct CUstream_st*;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;
  return cudaSuccess;
}
