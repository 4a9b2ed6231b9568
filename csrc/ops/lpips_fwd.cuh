// Forward of lpips_distance. It needs the norms before it can take differences, so the threads of a
// block hold a tile of positions with all of its channels in registers: kHeld packs of either map
// each.
#pragma once

#include "lpips_maps.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kMostPacks = 4;        // of one position in a thread, by channel
constexpr int kFewestLanes = 4;      // of one position, by channel
constexpr int kMostChannels = 2048;  // of a position, in a block

__device__ __forceinline__ float norm_with_eps(float square, float eps) {
  return square == 0.0f ? 0.0f : sqrtf(square) + eps;
}

__device__ __forceinline__ float radial_of(float along, float square) {
  return square == 0.0f ? 0.0f : along / sqrtf(square);
}

// Of a position.
struct alignas(16) Divisors {
  Divisor<float> p, q;
};

// Zeros from C to `count`, where the threads hold zeros. After the first tile has been asked for:
// the wait is the same.
__device__ __forceinline__ void load_weights(const View<1>& weight, int count, float* weights) {
  for (int c = threadIdx.x; c < count; c += kThreads) {
    weights[c] = c < weight.size[0] ? number(weight, c) : 0.0f;
  }
  __syncthreads();
}

// --- forward by position. `lanes` threads next to each other hold the positions of a tile; the
// other threads hold them for other channels.

// sums[warp] = the sum over the threads of this warp with the same position.
__device__ __forceinline__ void sum_in_warp(float value, int lanes, int position, float* sums) {
  for (int offset = lanes; offset < kWarpSize; offset *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize < lanes) sums[warp * kWarpSize * kPositions + position] = value;
}

__device__ __forceinline__ float sum_of_warps(const float* sums, int position) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * kWarpSize * kPositions + position];
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    by_position_kernel(const LpipsDistanceFwd a, const Chunks chunks, int lanes) {
  constexpr int N = kPositions;
  constexpr int kTile = kWarpSize * N;  // positions, at most
  static_assert(kTile <= kThreads, "a thread has one position's statistics");
  __shared__ float p_sums[kWarps * kTile], q_sums[kWarps * kTile], along_sums[kWarps * kTile];
  __shared__ float p_norms[kTile], q_norms[kTile], weights[kMostChannels];
  const Chunk chunk(chunks);
  const int64_t size = a.size();
  float* statistics = a.statistics_of<float>(chunk.b);
  const T* pred = a.pred.as<T>() + a.pred.offset(chunk.b);
  const T* target = a.target.as<T>() + a.target.offset(chunk.b);
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  double distance = 0.0;
  for (int64_t tile = chunk.begin; tile < chunk.end; tile += lanes * N) {
    const int64_t position = tile + lane * N;
    Held<T, N> p_held[kHeld], q_held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t c = group + i * groups;
      const bool is_inside = position < chunk.end && c < a.pred.size[1];
      p_held[i].fetch_if(is_inside, pred + c * a.pred.stride[1] + position);
      q_held[i].fetch_if(is_inside, target + c * a.target.stride[1] + position);
    }
    if (tile == chunk.begin) load_weights(a.weight, groups * kHeld, weights);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float p_square = 0.0f, q_square = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const float u = p_held[i].value(j), v = q_held[i].value(j);
        p_square += u * u;
        q_square += v * v;
      }
      sum_in_warp(p_square, lanes, lane * N + j, p_sums);
      sum_in_warp(q_square, lanes, lane * N + j, q_sums);
    }
    __syncthreads();
    const int own = threadIdx.x;  // a position of the tile, for the statistics
    const bool has_own = own < lanes * N && tile + own < chunk.end;
    float own_square = 0.0f;
    if (own < lanes * N) {
      own_square = sum_of_warps(p_sums, own);
      p_norms[own] = norm_with_eps(own_square, float(a.eps));
      q_norms[own] = norm_with_eps(sum_of_warps(q_sums, own), float(a.eps));
    }
    if (has_own) {
      statistics[tile + own] = p_norms[own];
      statistics[size + tile + own] = q_norms[own];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Divisor<float> p_divisor = math::divisor(p_norms[lane * N + j]);
      const Divisor<float> q_divisor = math::divisor(q_norms[lane * N + j]);
      float along = 0.0f, squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int c = group + i * groups;
        const float weight = weights[c];
        const float u = math::quotient(p_held[i].value(j), p_divisor);
        const float difference = u - math::quotient(q_held[i].value(j), q_divisor);
        squares += weight * difference * difference;
        along += weight * difference * u;
      }
      distance += squares;
      sum_in_warp(along, lanes, lane * N + j, along_sums);
    }
    __syncthreads();
    if (has_own) {
      statistics[2 * size + tile + own] = radial_of(sum_of_warps(along_sums, own), own_square);
    }
  }
  store_partial(warp_sum(distance), chunks);
}

// --- forward by channel. `lanes` threads next to each other, of one warp, hold the channels of a
// position, kPacks packs each; a thread holds several positions. What is the same for all channels,
// with its square roots and divisions, one thread of the warp computes for each position.

template <typename T, int kPacks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    by_channel_kernel(const LpipsDistanceFwd a, const Chunks chunks, int lanes) {
  constexpr int N = kPackOf<T>;
  constexpr int kRows = kHeld / kPacks;  // positions of a thread
  // positions of a warp; only where one pack is enough, fewer lanes are
  constexpr int kMost = kPacks == 1 ? kRows * kWarpSize / kFewestLanes : kRows;
  __shared__ float weights[kMostChannels];
  __shared__ Pack<float, 2> sums_of_warps[kWarps][kMost];  // squares of pred and target; along
  __shared__ Divisors divisors_of_warps[kWarps][kMost];
  const Chunk chunk(chunks);
  const int64_t size = a.size();
  float* statistics = a.statistics_of<float>(chunk.b);
  const T* pred = a.pred.as<T>() + a.pred.offset(chunk.b);
  const T* target = a.target.as<T>() + a.target.offset(chunk.b);
  const int warp = threadIdx.x / kWarpSize, thread = threadIdx.x % kWarpSize;
  const int lane = thread % lanes, group = thread / lanes, groups = kWarpSize / lanes;
  Pack<float, 2>* sums = sums_of_warps[warp];
  Divisors* divisors = divisors_of_warps[warp];
  const int own_count = groups * kRows;  // positions of this warp
  double distance = 0.0;
  for (int64_t tile = chunk.begin; tile < chunk.end; tile += kWarps * own_count) {
    const int64_t first = tile + warp * own_count;
    Held<T, N> p_held[kHeld], q_held[kHeld];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t position = first + group + k * groups;
#pragma unroll
      for (int m = 0; m < kPacks; ++m) {
        const int c = (lane + m * lanes) * N;
        const bool is_inside = position < chunk.end && c < a.pred.size[1];
        p_held[k * kPacks + m].fetch_if(is_inside, pred + position * a.pred.stride[3] + c);
        q_held[k * kPacks + m].fetch_if(is_inside, target + position * a.target.stride[3] + c);
      }
    }
    if (tile == chunk.begin) load_weights(a.weight, lanes * kPacks * N, weights);
    __syncwarp();  // the last tile's sums have been read
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      float p_square = 0.0f, q_square = 0.0f;
#pragma unroll
      for (int m = 0; m < kPacks; ++m) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float u = p_held[k * kPacks + m].value(j);
          const float v = q_held[k * kPacks + m].value(j);
          p_square += u * u;
          q_square += v * v;
        }
      }
      int offset = lanes / 2;
      do {  // kFewestLanes are more than one
        p_square += __shfl_xor_sync(0xffffffffu, p_square, offset);
        q_square += __shfl_xor_sync(0xffffffffu, q_square, offset);
        offset /= 2;
      } while (offset > 0);
      if (lane == 0) sums[group + k * groups] = {p_square, q_square};
    }
    __syncwarp();
#pragma unroll 1
    for (int own = thread; own < own_count; own += kWarpSize) {
      const float p_norm = norm_with_eps(sums[own].values[0], float(a.eps));
      const float q_norm = norm_with_eps(sums[own].values[1], float(a.eps));
      divisors[own] = {math::divisor(p_norm), math::divisor(q_norm)};
      if (first + own < chunk.end) {
        statistics[first + own] = p_norm;
        statistics[size + first + own] = q_norm;
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      p_held[i].forget_values();
      q_held[i].forget_values();
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const Divisors divisor = divisors[group + k * groups];
      float along = 0.0f, squares = 0.0f;
#pragma unroll
      for (int m = 0; m < kPacks; ++m) {
        const int c = (lane + m * lanes) * N;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float u = math::quotient(p_held[k * kPacks + m].value(j), divisor.p);
          const float v = math::quotient(q_held[k * kPacks + m].value(j), divisor.q);
          squares += weights[c + j] * (u - v) * (u - v);
          along += weights[c + j] * (u - v) * u;
        }
      }
      distance += squares;
      int offset = lanes / 2;
      do {
        along += __shfl_xor_sync(0xffffffffu, along, offset);
        offset /= 2;
      } while (offset > 0);
      if (lane == 0) sums[group + k * groups].values[1] = along;
    }
    __syncwarp();
#pragma unroll 1
    for (int own = thread; own < own_count; own += kWarpSize) {
      if (first + own < chunk.end) {
        statistics[2 * size + first + own] = radial_of(sums[own].values[1], sums[own].values[0]);
      }
    }
  }
  store_partial(warp_sum(distance), chunks);
}

// --- any strides and dtypes

__global__ void __launch_bounds__(kThreads, kBlocks)
    any_layout_kernel(const LpipsDistanceFwd a, const Chunks chunks) {
  const Chunk chunk(chunks);
  const int64_t size = a.size();
  float* statistics = a.statistics_of<float>(chunk.b);
  double distance = 0.0;
  for (int64_t position = chunk.begin + threadIdx.x; position < chunk.end; position += kThreads) {
    const Position at(a.pred, chunk.b, position);
    double p_total = 0.0, q_total = 0.0, along_total = 0.0;
    for (int64_t begin = 0; begin < a.pred.size[1]; begin += kPart) {
      float p_part = 0.0f, q_part = 0.0f;
      for_part(a, at, begin, [&](int64_t, float u, float v) {
        p_part += u * u;
        q_part += v * v;
      });
      p_total += p_part;
      q_total += q_part;
    }
    const float p_square = float(p_total), q_square = float(q_total);
    const float p_norm = norm_with_eps(p_square, float(a.eps));
    const float q_norm = norm_with_eps(q_square, float(a.eps));
    const Divisor<float> p_divisor = math::divisor(p_norm), q_divisor = math::divisor(q_norm);
    for (int64_t begin = 0; begin < a.pred.size[1]; begin += kPart) {
      float squares = 0.0f, along = 0.0f;
      for_part(a, at, begin, [&](int64_t c, float pred, float target) {
        const float weight = number(a.weight, c);
        const float u = math::quotient(pred, p_divisor);
        const float difference = u - math::quotient(target, q_divisor);
        squares += weight * difference * difference;
        along += weight * difference * u;
      });
      distance += squares;
      along_total += along;
    }
    statistics[position] = p_norm;
    statistics[size + position] = q_norm;
    statistics[2 * size + position] = radial_of(float(along_total), p_square);
  }
  store_partial(warp_sum(distance), chunks);
}

}  // namespace
}  // namespace pixelgen::cuda
