// Backward of lpips_distance: one pass, for forward kept the norms.
#pragma once

#include "lpips_maps.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kChannelsOfBlock = 64;  // by position

__device__ __forceinline__ float factor_of(const LpipsDistanceBwd& g, int64_t b) {
  const double grad = number(g.grad_distance, b);
  return float(grad * 2.0 / double(g.size()));
}

// A block has kWarpSize packs of positions and kChannelsOfBlock channels. What they are divided by
// takes registers too, so half as many packs are held.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    grads_by_position_kernel(const LpipsDistanceBwd g, int64_t tiles, int64_t parts) {
  constexpr int N = kPositions, kHalf = kHeld / 2;
  const int64_t size = g.size(), b = blockIdx.x / (tiles * parts);
  const int64_t tile = blockIdx.x % tiles, part = blockIdx.x / tiles % parts;
  __shared__ float weights[kChannelsOfBlock];
  if (threadIdx.x < kChannelsOfBlock) {
    const int64_t c = part * kChannelsOfBlock + threadIdx.x;
    weights[threadIdx.x] = c < g.pred.size[1] ? number(g.weight, c) : 0.0f;
  }
  __syncthreads();
  const int64_t position = (tile * kWarpSize + threadIdx.x % kWarpSize) * N;
  if (position >= size) return;  // no barriers from here on
  const T* pred = g.pred.as<T>() + g.pred.offset(b) + position;
  const T* target = g.target.as<T>() + g.target.offset(b) + position;
  T* grad = g.grad_pred.as<T>() + g.grad_pred.offset(b) + position;
  const int64_t first = part * kChannelsOfBlock + threadIdx.x / kWarpSize;
  const int64_t end = min((part + 1) * kChannelsOfBlock, g.pred.size[1]);
  const float* statistics = g.statistics_of<float>(b) + position;
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
      p_held[i].fetch_if(c < end, pred + c * g.pred.stride[1]);
      q_held[i].fetch_if(c < end, target + c * g.target.stride[1]);
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
        store<N, true>(out, grad + c * g.grad_pred.stride[1], N);
      }
    }
  }
}

// `lanes` threads next to each other have the channels of a position, one pack at a time; a thread
// has kHeld positions.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    grads_by_channel_kernel(const LpipsDistanceBwd g, int64_t tiles, int lanes) {
  constexpr int N = kPackOf<T>;
  const int64_t size = g.size(), b = blockIdx.x / tiles;
  const int lane = threadIdx.x % lanes, groups = kThreads / lanes;
  const int64_t first = blockIdx.x % tiles * groups * kHeld + threadIdx.x / lanes;
  const T* pred = g.pred.as<T>() + g.pred.offset(b);
  const T* target = g.target.as<T>() + g.target.offset(b);
  T* grad = g.grad_pred.as<T>() + g.grad_pred.offset(b);
  const float* statistics = g.statistics_of<float>(b);
  const float factor = factor_of(g, b);
  for (int64_t c = int64_t(lane) * N; c < g.pred.size[1]; c += lanes * N) {
    Held<T, N> p_held[kHeld], q_held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t position = first + k * groups;
      p_held[k].fetch_if(position < size, pred + position * g.pred.stride[3] + c);
      q_held[k].fetch_if(position < size, target + position * g.target.stride[3] + c);
    }
    float weight[N];
#pragma unroll
    for (int j = 0; j < N; ++j) weight[j] = number(g.weight, c + j);
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
        store<N, true>(out, grad + position * g.grad_pred.stride[3] + c, N);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    grads_of_any_layout_kernel(const LpipsDistanceBwd g, int64_t tiles) {
  const int64_t size = g.size(), b = blockIdx.x / tiles;
  const int64_t position = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (position >= size) return;  // no barriers here
  const Position at(g.pred, b, position);
  const float* statistics = g.statistics_of<float>(b);
  const Divisor<float> p_divisor = math::divisor(statistics[position]);
  const Divisor<float> q_divisor = math::divisor(statistics[size + position]);
  const float radial = statistics[2 * size + position], factor = factor_of(g, b);
  for (int64_t begin = 0; begin < g.pred.size[1]; begin += kPart) {
    for_part(g, at, begin, [&](int64_t c, float pred, float target) {
      const float weight = number(g.weight, c);
      const float grad =
          math::unit_distance_grad(pred, target, weight, p_divisor, q_divisor, radial, factor);
      store_one(grad, g.grad_pred.data, g.pred.dtype, g.grad_pred.offset(b, c, at.h, at.w));
    });
  }
}

}  // namespace
}  // namespace pixelgen::cuda
