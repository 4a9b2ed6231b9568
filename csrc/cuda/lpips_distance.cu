// Bound by bytes: pred and target are read once (backward: and grad_pred written once). Forward
// needs the norms before it can take differences, so the threads of a block hold a tile of
// positions with all of its channels in registers: kHeld packs of either map each.
//
// "By position": the positions of a channel are neighbours in memory (NCHW) and a pack holds some
// of them. "By channel": the channels of a position are (channels-last). Maps that allow no packs,
// or two maps of different layouts or dtypes, go one element at a time.
#include "../lpips_distance.h"
#include "../math/distance.h"
#include "distances.cuh"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

using math::Divisor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocks = 2;            // of a multiprocessor: 128 registers a thread
constexpr int kPositions = 4;         // of a pack by position
constexpr int kHeld = 8;              // packs of either map in a thread's registers
constexpr int kMostPacks = 4;         // of one position in a thread, by channel
constexpr int kFewestLanes = 4;       // of one position, by channel
constexpr int kMostChannels = 2048;   // of a position, in a block
constexpr int kChannelsOfBlock = 64;  // backward by position
constexpr int kPart = 16;             // channels that are added up at a time

// Channels of a pack by channel.
template <typename T>
constexpr int kPackOf = 16 / sizeof(T);

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

// Where a block's chunk lies.
struct Chunk {
  int64_t b, begin, end, size;
  float* statistics;  // of the sample: three rows of `size`

  __device__ Chunk(const LpipsDistanceParams& p, int64_t index, int64_t chunks) {
    size = p.H * p.W;
    b = index / chunks;
    begin = index % chunks * p.positions_per_chunk;
    end = min(begin + p.positions_per_chunk, size);
    statistics = static_cast<float*>(p.statistics) + 3 * size * b;
  }
};

// The sum over the block, which is as good as the terms: a distance of few positions is a sum of
// few numbers.
__device__ __forceinline__ void store_partial(const LpipsDistanceParams& p, double distance) {
  __shared__ double sums[kWarps];
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    distance += __shfl_xor_sync(0xffffffffu, distance, lane);
  }
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = distance;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
    static_cast<float*>(p.partials)[blockIdx.x] = float(sum);
  }
}

// Zeros from C to `count`, where the threads hold zeros. After the first tile has been asked for:
// the wait is the same.
__device__ __forceinline__ void load_weights(const LpipsDistanceParams& p, int count,
                                             float* weights) {
  for (int c = threadIdx.x; c < count; c += kThreads) {
    weights[c] = c < p.C ? load_one(p.weight, p.weight_dtype, c * p.weight_stride, 0.0f) : 0.0f;
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
    by_position_kernel(const LpipsDistanceParams p, int64_t chunks, int lanes) {
  constexpr int N = kPositions;
  constexpr int kTile = kWarpSize * N;  // positions, at most
  static_assert(kTile <= kThreads, "a thread has one position's statistics");
  __shared__ float p_sums[kWarps * kTile], q_sums[kWarps * kTile], along_sums[kWarps * kTile];
  __shared__ float p_norms[kTile], q_norms[kTile], weights[kMostChannels];
  const Chunk chunk(p, blockIdx.x, chunks);
  const T* pred = static_cast<const T*>(p.pred) + chunk.b * p.pred_stride_b;
  const T* target = static_cast<const T*>(p.target) + chunk.b * p.target_stride_b;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  double distance = 0.0;
  for (int64_t tile = chunk.begin; tile < chunk.end; tile += lanes * N) {
    const int64_t position = tile + lane * N;
    Held<T, N> p_held[kHeld], q_held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t c = group + i * groups;
      const bool is_inside = position < chunk.end && c < p.C;
      p_held[i].fetch_if(is_inside, pred + c * p.pred_stride_c + position);
      q_held[i].fetch_if(is_inside, target + c * p.target_stride_c + position);
    }
    if (tile == chunk.begin) load_weights(p, groups * kHeld, weights);
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
      p_norms[own] = norm_with_eps(own_square, float(p.eps));
      q_norms[own] = norm_with_eps(sum_of_warps(q_sums, own), float(p.eps));
    }
    if (has_own) {
      chunk.statistics[tile + own] = p_norms[own];
      chunk.statistics[chunk.size + tile + own] = q_norms[own];
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
      chunk.statistics[2 * chunk.size + tile + own] =
          radial_of(sum_of_warps(along_sums, own), own_square);
    }
  }
  store_partial(p, distance);
}

// --- forward by channel. `lanes` threads next to each other, of one warp, hold the channels of a
// position, kPacks packs each; a thread holds several positions. What is the same for all channels,
// with its square roots and divisions, one thread of the warp computes for each position.

template <typename T, int kPacks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    by_channel_kernel(const LpipsDistanceParams p, int64_t chunks, int lanes) {
  constexpr int N = kPackOf<T>;
  constexpr int kRows = kHeld / kPacks;  // positions of a thread
  // positions of a warp; only where one pack is enough, fewer lanes are
  constexpr int kMost = kPacks == 1 ? kRows * kWarpSize / kFewestLanes : kRows;
  __shared__ float weights[kMostChannels];
  __shared__ Pack<float, 2> sums_of_warps[kWarps][kMost];  // squares of pred and target; along
  __shared__ Divisors divisors_of_warps[kWarps][kMost];
  const Chunk chunk(p, blockIdx.x, chunks);
  const T* pred = static_cast<const T*>(p.pred) + chunk.b * p.pred_stride_b;
  const T* target = static_cast<const T*>(p.target) + chunk.b * p.target_stride_b;
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
        const bool is_inside = position < chunk.end && c < p.C;
        p_held[k * kPacks + m].fetch_if(is_inside, pred + position * p.pred_stride_w + c);
        q_held[k * kPacks + m].fetch_if(is_inside, target + position * p.target_stride_w + c);
      }
    }
    if (tile == chunk.begin) load_weights(p, lanes * kPacks * N, weights);
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
      const float p_norm = norm_with_eps(sums[own].values[0], float(p.eps));
      const float q_norm = norm_with_eps(sums[own].values[1], float(p.eps));
      divisors[own] = {math::divisor(p_norm), math::divisor(q_norm)};
      if (first + own < chunk.end) {
        chunk.statistics[first + own] = p_norm;
        chunk.statistics[chunk.size + first + own] = q_norm;
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
        chunk.statistics[2 * chunk.size + first + own] =
            radial_of(sums[own].values[1], sums[own].values[0]);
      }
    }
  }
  store_partial(p, distance);
}

// --- any strides and dtypes: a thread per position

struct Place {
  int64_t pred, target, grad;  // offsets of channel 0
};

__device__ __forceinline__ Place place_of(const LpipsDistanceParams& p, int64_t b,
                                          int64_t position) {
  const int64_t h = position / p.W, w = position - h * p.W;
  return {b * p.pred_stride_b + h * p.pred_stride_h + w * p.pred_stride_w,
          b * p.target_stride_b + h * p.target_stride_h + w * p.target_stride_w, 0};
}

// fn(c, pred, target) for the channels [begin, begin + kPart) of a position.
template <typename Fn>
__device__ __forceinline__ void for_part(const LpipsDistanceParams& p, const Place& place,
                                         int64_t begin, Fn fn) {
  const int64_t end = min(begin + kPart, p.C);
  for (int64_t c = begin; c < end; ++c) {
    fn(c, load_one(p.pred, p.pred_dtype, place.pred + c * p.pred_stride_c, 0.0f),
       load_one(p.target, p.target_dtype, place.target + c * p.target_stride_c, 0.0f));
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    any_layout_kernel(const LpipsDistanceParams p, int64_t chunks) {
  const Chunk chunk(p, blockIdx.x, chunks);
  double distance = 0.0;
  for (int64_t position = chunk.begin + threadIdx.x; position < chunk.end; position += kThreads) {
    const Place place = place_of(p, chunk.b, position);
    double p_total = 0.0, q_total = 0.0, along_total = 0.0;
    for (int64_t begin = 0; begin < p.C; begin += kPart) {
      float p_part = 0.0f, q_part = 0.0f;
      for_part(p, place, begin, [&](int64_t, float u, float v) {
        p_part += u * u;
        q_part += v * v;
      });
      p_total += p_part;
      q_total += q_part;
    }
    const float p_square = float(p_total), q_square = float(q_total);
    const float p_norm = norm_with_eps(p_square, float(p.eps));
    const float q_norm = norm_with_eps(q_square, float(p.eps));
    const Divisor<float> p_divisor = math::divisor(p_norm), q_divisor = math::divisor(q_norm);
    for (int64_t begin = 0; begin < p.C; begin += kPart) {
      float squares = 0.0f, along = 0.0f;
      for_part(p, place, begin, [&](int64_t c, float pred, float target) {
        const float weight = load_one(p.weight, p.weight_dtype, c * p.weight_stride, 0.0f);
        const float u = math::quotient(pred, p_divisor);
        const float difference = u - math::quotient(target, q_divisor);
        squares += weight * difference * difference;
        along += weight * difference * u;
      });
      distance += squares;
      along_total += along;
    }
    chunk.statistics[position] = p_norm;
    chunk.statistics[chunk.size + position] = q_norm;
    chunk.statistics[2 * chunk.size + position] = radial_of(float(along_total), p_square);
  }
  store_partial(p, distance);
}

// --- backward

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

// --- what can be done with these maps

// Both in one dtype, their positions in one row: what packs need.
bool may_be_packed(const LpipsDistanceParams& p) {
  return p.H == 1 && p.pred_dtype == p.target_dtype;
}

bool is_by_position(const LpipsDistanceParams& p, int N) {
  return may_be_packed(p) && p.pred_stride_w == 1 && p.target_stride_w == 1 && p.W % N == 0 &&
         p.positions_per_chunk % N == 0 &&
         packs_are_aligned(p.pred, p.pred_dtype, N, p.pred_stride_b, p.pred_stride_c) &&
         packs_are_aligned(p.target, p.target_dtype, N, p.target_stride_b, p.target_stride_c) &&
         packs_are_aligned(p.statistics, DType::kFloat32, 4, p.W, 0);
}

bool is_by_channel(const LpipsDistanceParams& p, int N) {
  return may_be_packed(p) && p.pred_stride_c == 1 && p.target_stride_c == 1 && p.C % N == 0 &&
         packs_are_aligned(p.pred, p.pred_dtype, N, p.pred_stride_b, p.pred_stride_w) &&
         packs_are_aligned(p.target, p.target_dtype, N, p.target_stride_b, p.target_stride_w);
}

// The smallest power of two that is not below `count`, within these limits.
int power_of_two(int64_t count, int least, int limit) {
  int power = least;
  while (power < count && power < limit) power *= 2;
  return power;
}

template <typename T>
Status launch_chunks(const LpipsDistanceParams& p, int64_t chunks, cudaStream_t stream) {
  const unsigned grid = unsigned(p.B * chunks);
  int lanes = kWarpSize;
  if (is_by_position(p, kPositions) && p.C <= kMostChannels) {
    while (kThreads / lanes * kHeld < p.C) lanes /= 2;
    return launch(by_position_kernel<T>, grid, kThreads, stream, p, chunks, lanes);
  }
  const int64_t packs = p.C / kPackOf<T>;  // of a position
  if (is_by_channel(p, kPackOf<T>) && packs <= kMostPacks * kWarpSize) {
    lanes = power_of_two(packs, kFewestLanes, kWarpSize);
    const auto kernel = packs <= kWarpSize       ? by_channel_kernel<T, 1>
                        : packs <= 2 * kWarpSize ? by_channel_kernel<T, 2>
                                                 : by_channel_kernel<T, kMostPacks>;
    return launch(kernel, grid, kThreads, stream, p, chunks, lanes);
  }
  return launch(any_layout_kernel, grid, kThreads, stream, p, chunks);
}

template <typename T>
Status launch_grads(const LpipsDistanceGradParams& g, cudaStream_t stream) {
  const LpipsDistanceParams& p = g.forward;
  const auto grad_is_aligned = [&](int N, int64_t stride) {
    return packs_are_aligned(g.grad_pred, p.pred_dtype, N, g.grad_pred_stride_b, stride);
  };
  if (is_by_position(p, kPositions) && g.grad_pred_stride_w == 1 &&
      grad_is_aligned(kPositions, g.grad_pred_stride_c)) {
    const int64_t tiles = ceil_div(p.W, kWarpSize * kPositions);
    const int64_t parts = ceil_div(p.C, kChannelsOfBlock);
    if (p.B * tiles * parts > kMaxBlocks) return "more positions than a grid holds";
    return launch(grads_by_position_kernel<T>, unsigned(p.B * tiles * parts), kThreads, stream, g,
                  tiles, parts);
  }
  if (is_by_channel(p, kPackOf<T>) && g.grad_pred_stride_c == 1 &&
      grad_is_aligned(kPackOf<T>, g.grad_pred_stride_w)) {
    const int lanes = power_of_two(p.C / kPackOf<T>, 1, kThreads);
    const int64_t tiles = ceil_div(p.W, kThreads / lanes * kHeld);
    if (p.B * tiles > kMaxBlocks) return "more positions than a grid holds";
    return launch(grads_by_channel_kernel<T>, unsigned(p.B * tiles), kThreads, stream, g, tiles,
                  lanes);
  }
  const int64_t tiles = ceil_div(p.H * p.W, kThreads);
  if (p.B * tiles > kMaxBlocks) return "more positions than a grid holds";
  return launch(grads_of_any_layout_kernel, unsigned(p.B * tiles), kThreads, stream, g, tiles);
}

Status check_dtypes(const LpipsDistanceParams& p) {
  const bool is_double = p.pred_dtype == DType::kFloat64 || p.target_dtype == DType::kFloat64;
  return is_double ? "pred and target must be fp32, bf16 or fp16" : nullptr;
}

}  // namespace

Status lpips_distance_fwd(const LpipsDistanceParams& p, void* stream) {
  if (p.B == 0) return nullptr;  // no blocks would be an error
  Status status = check_dtypes(p);
  if (status != nullptr) return status;
  const int64_t chunks = ceil_div(p.H * p.W, p.positions_per_chunk);
  if (p.B * chunks > kMaxBlocks) return "more chunks of positions than a grid holds";
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.pred_dtype) {
    case DType::kFloat32:
      status = launch_chunks<float>(p, chunks, cuda_stream);
      break;
    case DType::kBFloat16:
      status = launch_chunks<__nv_bfloat16>(p, chunks, cuda_stream);
      break;
    default:
      status = launch_chunks<__half>(p, chunks, cuda_stream);
  }
  if (status != nullptr) return status;
  return launch_chunk_means(p.partials, p.distance, p.B, chunks, p.H * p.W, cuda_stream);
}

Status lpips_distance_bwd(const LpipsDistanceGradParams& g, void* stream) {
  const LpipsDistanceParams& p = g.forward;
  if (p.B == 0) return nullptr;
  const Status status = check_dtypes(p);
  if (status != nullptr) return status;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.pred_dtype) {
    case DType::kFloat32:
      return launch_grads<float>(g, cuda_stream);
    case DType::kBFloat16:
      return launch_grads<__nv_bfloat16>(g, cuda_stream);
    default:
      return launch_grads<__half>(g, cuda_stream);
  }
}

}  // namespace pixelgen::cuda
