// Backward of lpips_distance: one pass, for forward kept the norms.
#pragma once

#include "lpips_maps.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kChannelsOfBlock = 64;  // by position

__device__ __forceinline__ float factor_of(const LpipsDistanceGradParams& g, int64_t b) {
  const double grad =
      load_one(g.grad_distance, g.grad_distance_dtype, b * g.grad_distance_stride, 0.0f);
  return float(grad * 2.0 / double(g.forward.H * g.forward.W));
}

// A block has kWarpSize packs of positions and kChannelsOfBlock channels. What they are divided by
// takes registers too, so half as many packs are held.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    grads_by_position_kernel(const LpipsDistanceGradParams g, int64_t tiles, int64_t parts) {
  constexpr int N = kPositions, kHalf = kHeld / 2;
  const LpipsDistanceParams& p = g.forward;
  const int64_t size = p.W, b = blockIdx.x / (tiles * parts);
  const int64_t tile = blockIdx.x % tiles, part = blockIdx.x / tiles % parts;
  __shared__ float weights[kChannelsOfBlock];
  if (threadIdx.x < kChannelsOfBlock) {
    const int64_t c = part * kChannelsOfBlock + threadIdx.x;
    weights[threadIdx.x] =
        c < p.C ? load_one(p.weight, p.weight_dtype, c * p.weight_stride, 0.0f) : 0.0f;
  }
  __syncthreads();
  const int64_t position = (tile * kWarpSize + threadIdx.x % kWarpSize) * N;
  if (position >= size) return;  // no barriers from here on
  const T* pred = static_cast<const T*>(p.pred) + b * p.pred_stride_b + position;
  const T* target = static_cast<const T*>(p.target) + b * p.target_stride_b + position;
  T* grad = static_cast<T*>(g.grad_pred) + b * g.grad_pred_stride_b + position;
  const int64_t first = part * kChannelsOfBlock + threadIdx.x / kWarpSize;
  const int64_t end = min((part + 1) * kChannelsOfBlock, p.C);
  const float* statistics = static_cast<const float*>(p.statistics) + 3 * size * b + position;
  const float factor = factor_of(g, b);
  float p_norm[N], q_norm[N], radial[N];
  load<N, true>(statistics, N, p_norm);
  load<N, true>(statistics + size, N, q_norm);
  load<N, true>(statistics + 2 * size, N, radial);
  Divisor<float> p_divisor[N], q_divisor[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    p_divisor[j] = math::divisor(p_norm[j]);
    q_divisor[j] = math::divisor(q_norm[j]);
  }
#pragma unroll 1
  for (int64_t begin = first; begin < end; begin += kHalf * kWarps) {
    Held<T, N> p_held[kHalf], q_held[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int64_t c = begin + i * kWarps;
      p_held[i].fetch_if(c < end, pred + c * p.pred_stride_c);
      q_held[i].fetch_if(c < end, target + c * p.target_stride_c);
    }
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int64_t c = begin + i * kWarps;
      if (c < end) {
        const float weight = weights[c - part * kChannelsOfBlock];
        float out[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
          out[j] = math::unit_distance_grad(p_held[i].value(j), q_held[i].value(j), weight,
                                            p_divisor[j], q_divisor[j], radial[j], factor);
        }
        store<N, true>(out, grad + c * g.grad_pred_stride_c, N);
      }
    }
  }
}

// `lanes` threads next to each other have the channels of a position, one pack at a time; a thread
// has kHeld positions.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    grads_by_channel_kernel(const LpipsDistanceGradParams g, int64_t tiles, int lanes) {
  constexpr int N = kPackOf<T>;
  const LpipsDistanceParams& p = g.forward;
  const int64_t size = p.W, b = blockIdx.x / tiles;
  const int lane = threadIdx.x % lanes, groups = kThreads / lanes;
  const int64_t first = blockIdx.x % tiles * groups * kHeld + threadIdx.x / lanes;
  const T* pred = static_cast<const T*>(p.pred) + b * p.pred_stride_b;
  const T* target = static_cast<const T*>(p.target) + b * p.target_stride_b;
  T* grad = static_cast<T*>(g.grad_pred) + b * g.grad_pred_stride_b;
  const float* statistics = static_cast<const float*>(p.statistics) + 3 * size * b;
  const float factor = factor_of(g, b);
  for (int64_t c = int64_t(lane) * N; c < p.C; c += lanes * N) {
    Held<T, N> p_held[kHeld], q_held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t position = first + k * groups;
      p_held[k].fetch_if(position < size, pred + position * p.pred_stride_w + c);
      q_held[k].fetch_if(position < size, target + position * p.target_stride_w + c);
    }
    float weight[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      weight[j] = load_one(p.weight, p.weight_dtype, (c + j) * p.weight_stride, 0.0f);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t position = first + k * groups;
      if (position < size) {
        const Divisor<float> p_divisor = math::divisor(statistics[position]);
        const Divisor<float> q_divisor = math::divisor(statistics[size + position]);
        const float radial = statistics[2 * size + position];
        float out[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
          out[j] = math::unit_distance_grad(p_held[k].value(j), q_held[k].value(j), weight[j],
                                            p_divisor, q_divisor, radial, factor);
        }
        store<N, true>(out, grad + position * g.grad_pred_stride_w + c, N);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    grads_of_any_layout_kernel(const LpipsDistanceGradParams g, int64_t tiles) {
  const LpipsDistanceParams& p = g.forward;
  const int64_t size = p.H * p.W, b = blockIdx.x / tiles;
  const int64_t position = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (position >= size) return;  // no barriers here
  Place place = place_of(p, b, position);
  place.grad = b * g.grad_pred_stride_b + position / p.W * g.grad_pred_stride_h +
               position % p.W * g.grad_pred_stride_w;
  const float* statistics = static_cast<const float*>(p.statistics) + 3 * size * b;
  const Divisor<float> p_divisor = math::divisor(statistics[position]);
  const Divisor<float> q_divisor = math::divisor(statistics[size + position]);
  const float radial = statistics[2 * size + position], factor = factor_of(g, b);
  for (int64_t begin = 0; begin < p.C; begin += kPart) {
    for_part(p, place, begin, [&](int64_t c, float pred, float target) {
      const float weight = load_one(p.weight, p.weight_dtype, c * p.weight_stride, 0.0f);
      const float grad =
          math::unit_distance_grad(pred, target, weight, p_divisor, q_divisor, radial, factor);
      store_one(grad, g.grad_pred, p.pred_dtype, place.grad + c * g.grad_pred_stride_c);
    });
  }
}

}  // namespace
}  // namespace pixelgen::cuda
