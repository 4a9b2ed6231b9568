// Forward and backward of a norm with shift and scale, row by row, for the ops that end in one. The
// op says where the row comes from (`Rows`) and where its gradient goes (`Grads`).
//
// A row belongs to the threads that share threadIdx.y, which hold kPerThread of its elements each
// in registers: every input is read once and every output written once. A block takes a chunk of
// rows of one image; while it works on a row, the next one is on its way. The rows of threads add
// up what they have of a chunk's sums at its end, so a chunk writes one partial sum per column; two
// small kernels add those, in a fixed order.
//
// A row of more elements than a block holds is cut into sections, one per block: each block reads
// the whole row for its sums and writes its own section. No model is so wide: only the kernels for
// single elements can do it.
#pragma once

#include "../math/norm.h"
#include "../rms_norm_modulate.h"
#include "vec.cuh"

namespace pixelgen::cuda {

constexpr int kPerThread = 8;
constexpr int kMaxThreads = 512;  // of a block: 128 registers a thread
// of a block of backward that needs more registers: single elements, or a modulation per token
constexpr int kFewThreads = 256;
constexpr int kForwardThreads = 128;  // of a block of forward; narrow rows share one
constexpr int kForwardRows = 8;       // of each row of threads: folding costs 1/8 of a row's work
constexpr int kColumns = 32;          // of the second pass of backward, per block
constexpr int kImageLanes = 8;        // chunks of an image that are added side by side
constexpr int kWeightLanes = 32;      // images that are added side by side

// --- N neighbours of a row

// Elements of rows that allow no packs: dtype known at run time, one element at a time.
struct AnyDtype {};

// N neighbours that are on their way. Nothing waits for them before `values` does, so a thread has
// many under way at a time. T is their dtype; their address is a multiple of a pack's.
template <typename T, int N>
struct Fetched {
  Pack<T, N> pack;

  __device__ __forceinline__ void fetch(const void* base, DType, int64_t offset) {
    pack = *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(base) + offset);
  }
  __device__ __forceinline__ void values(DType, float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(pack.values[i]);
  }
};

// The same for a dtype that is known at run time; the branches are the same for all threads. fp64
// is converted on arrival.
template <int N>
struct Fetched<AnyDtype, N> {
  union {
    Pack<float, N> singles;
    Pack<__nv_bfloat16, N> bfloats;
    Pack<__half, N> halves;
  };

  __device__ __forceinline__ void fetch(const void* base, DType dtype, int64_t offset) {
    const int size = dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat64 ? 8 : 2;
    const void* source = static_cast<const char*>(base) + offset * size;
    if (size == 2)
      halves = *static_cast<const Pack<__half, N>*>(source);  // or bf16: the same bytes
    else if (size == 4)
      singles = *static_cast<const Pack<float, N>*>(source);
    else
      load<N, true>(static_cast<const double*>(source), N, singles.values);
  }
  __device__ __forceinline__ void values(DType dtype, float (&out)[N]) const {
    switch (dtype) {
      case DType::kBFloat16:
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = to_float(bfloats.values[i]);
        return;
      case DType::kFloat16:
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = to_float(halves.values[i]);
        return;
      default:
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = singles.values[i];
        return;
    }
  }
};

// N values to a buffer of T, or of a dtype known at run time.
template <typename T, int N>
__device__ __forceinline__ void store_values(const float (&in)[N], void* base, DType dtype,
                                             int64_t offset) {
  if constexpr (sizeof(T) == 1)
    store_as<N, true>(in, base, dtype, offset, N);
  else
    store<N, true>(in, static_cast<T*>(base) + offset, N);
}

// What a value of T becomes when it is stored.
template <typename T>
__device__ __forceinline__ float rounded(float value, DType dtype) {
  if constexpr (sizeof(T) == 1) {
    if (dtype == DType::kBFloat16) return rounded<__nv_bfloat16>(value, dtype);
    return dtype == DType::kFloat16 ? rounded<__half>(value, dtype) : value;
  } else {
    T stored;
    from_float(value, &stored);
    return to_float(stored);
  }
}

// --- shift, scale, weight and bias

// Those of N neighbouring columns, on their way.
template <int N>
struct FetchedModulation {
  Fetched<AnyDtype, N> weight, bias, shift, scale;

  __device__ __forceinline__ void fetch_affine(const RmsNormModulateParams& p, int c) {
    if (p.weight != nullptr) weight.fetch(p.weight, p.weight_dtype, c);
    if (p.bias != nullptr) bias.fetch(p.bias, p.weight_dtype, c);
  }
  __device__ __forceinline__ void fetch_scale(const RmsNormModulateParams& p, int64_t image,
                                              int64_t row_of_image, int c) {
    if (p.scale == nullptr) return;
    const int64_t row = p.per_token ? row_of_image * p.scale_row_stride : 0;
    scale.fetch(p.scale, p.modulation_dtype, image * p.scale_image_stride + row + c);
  }
  __device__ __forceinline__ void fetch_shift(const RmsNormModulateParams& p, int64_t image,
                                              int64_t row_of_image, int c) {
    if (p.shift == nullptr) return;
    const int64_t row = p.per_token ? row_of_image * p.shift_row_stride : 0;
    shift.fetch(p.shift, p.modulation_dtype, image * p.shift_image_stride + row + c);
  }
};

template <int N>
__device__ __forceinline__ void values_or(const Fetched<AnyDtype, N>& fetched, const void* base,
                                          DType dtype, float otherwise, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = otherwise;
  if (base != nullptr) fetched.values(dtype, out);
}

// --- the rows of a block

// How the work is cut up; the same for forward and backward.
struct Tiling {
  int64_t rows_per_chunk, chunks_per_image;
  int sections;
};

template <int N>
struct BlockRows {
  int64_t image, first, last;  // rows of the image
  int64_t chunk;               // of all images
  int section;

  __device__ BlockRows(const RmsNormModulateParams& p, const Tiling& tiling) {
    section = N == 1 ? int(blockIdx.x % tiling.sections) : 0;
    chunk = N == 1 ? blockIdx.x / tiling.sections : blockIdx.x;
    image = chunk / tiling.chunks_per_image;
    first = chunk % tiling.chunks_per_image * tiling.rows_per_chunk;
    last = min(first + tiling.rows_per_chunk, p.rows_per_image);
  }
};

// First column of a thread's pack.
template <int N>
__device__ __forceinline__ int column(int section, int pack) {
  return ((section * (kPerThread / N) + pack) * int(blockDim.x) + int(threadIdx.x)) * N;
}

// Sums over a row, for the threads that share threadIdx.y; every thread of the block must call it.
// A warp never holds two rows.
class RowSums {
 public:
  __device__ explicit RowSums(float* storage) : storage_(storage) {}

  __device__ __forceinline__ void add(float& a, float& b) {
    a = warp_sum(a);
    b = warp_sum(b);
    if (blockDim.x == kWarpSize) return;  // the same for all threads
    const int warps = int(blockDim.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
    float* row = storage_ + 2 * warps * threadIdx.y;
    // two storages in turn: when one is written again, all have read it
    storage_ += is_second_ ? -kSize : kSize;
    is_second_ = !is_second_;
    if (lane == 0) {
      row[2 * (threadIdx.x / kWarpSize)] = a;
      row[2 * (threadIdx.x / kWarpSize) + 1] = b;
    }
    __syncthreads();
    a = warp_sum(lane < warps ? row[2 * lane] : 0.0f);
    b = warp_sum(lane < warps ? row[2 * lane + 1] : 0.0f);
  }
  static constexpr int kSize = 2 * kMaxThreads / kWarpSize;  // floats of one storage

 private:
  float* storage_;
  bool is_second_ = false;
};

// --- forward

// Rows gives N neighbours of a row: Rows::Fetch holds what they are made of, `fetch` requests it,
// `values` makes them, `keep` stores what else the op wants of them.
template <typename Rows, bool kPerToken>
__global__ void __launch_bounds__(kMaxThreads)
    norm_fwd_kernel(const typename Rows::Params params, const Tiling tiling) {
  constexpr int N = Rows::N, kPacks = kPerThread / N;
  using T = typename Rows::T;
  using Fetch = typename Rows::Fetch;
  __shared__ float storage[2 * RowSums::kSize];
  RowSums row_sums(storage);
  const RmsNormModulateParams& p = Rows::norm(params);
  const BlockRows<N> block(p, tiling);
  const int C = int(p.C);
  const float inverse_width = 1.0f / float(C);

  int64_t row = block.first + threadIdx.y;
  Fetch next[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = column<N>(block.section, i);
    if (row < block.last && c < C) next[i].fetch(params, block.image, row, c);
  }
  // one factor and one offset per column; weight and bias when shift and scale are per token
  float factor[kPacks][N], offset[kPacks][N];
  {
    FetchedModulation<N> modulation[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
      if (c >= C) continue;
      modulation[i].fetch_affine(p, c);
      if constexpr (!kPerToken) {
        modulation[i].fetch_scale(p, block.image, 0, c);
        modulation[i].fetch_shift(p, block.image, 0, c);
      }
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float scale[N], shift[N];
      const bool is_in = column<N>(block.section, i) < C;
      const void* shared_scale = is_in && !kPerToken ? p.scale : nullptr;
      const void* shared_shift = is_in && !kPerToken ? p.shift : nullptr;
      values_or(modulation[i].weight, is_in ? p.weight : nullptr, p.weight_dtype, 1.0f, factor[i]);
      values_or(modulation[i].bias, is_in ? p.bias : nullptr, p.weight_dtype, 0.0f, offset[i]);
      values_or(modulation[i].scale, shared_scale, p.modulation_dtype, 0.0f, scale);
      values_or(modulation[i].shift, shared_shift, p.modulation_dtype, 0.0f, shift);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const math::Affine<float> affine =
            math::fold_modulation(factor[i][j], offset[i][j], scale[j], shift[j]);
        factor[i][j] = affine.factor;
        offset[i][j] = affine.offset;
      }
    }
  }

  // rows of threads without a row stay for the sums
  for (int64_t base = block.first; base < block.last; base += blockDim.y, row += blockDim.y) {
    const bool is_live = row < block.last;
    const int64_t dense_row = block.image * p.rows_per_image + row;
    float x[kPacks][N];
    float sum = 0.0f, squares = 0.0f, unused = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
#pragma unroll
      for (int j = 0; j < N; ++j) x[i][j] = 0.0f;
      if (is_live && c < C) {
        next[i].values(params, block.image, row, c, x[i]);
        Rows::keep(params, dense_row, c, x[i]);
        if (row + blockDim.y < block.last) {
          next[i].fetch(params, block.image, row + blockDim.y, c);
        }
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum += x[i][j];
        squares += x[i][j] * x[i][j];
      }
    }
    // Adds term(x) over the row's other sections, which other blocks hold.
    const auto add_sections = [&](float& total, auto term) {
      if constexpr (N > 1) return;
      for (int section = 0; is_live && section < tiling.sections; ++section) {
        if (section == block.section) continue;
#pragma unroll 1
        for (int i = 0; i < kPacks; ++i) {
          const int c = column<N>(section, i);
          if (c >= C) continue;
          Fetch fetch;
          float values[N];
          fetch.fetch(params, block.image, row, c);
          fetch.values(params, block.image, row, c, values);
#pragma unroll
          for (int j = 0; j < N; ++j) total += term(values[j]);
        }
      }
    };
    FetchedModulation<N> modulation[kPacks];
    if (kPerToken && is_live) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int c = column<N>(block.section, i);
        if (c >= C) continue;
        modulation[i].fetch_scale(p, block.image, row, c);
        modulation[i].fetch_shift(p, block.image, row, c);
      }
    }
    float mean = 0.0f;
    if (p.layer_norm) {
      add_sections(sum, [](float value) { return value; });
      row_sums.add(sum, unused);
      mean = sum * inverse_width;
      squares = 0.0f;  // around the mean: the difference of two large sums would lose digits
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const bool is_in = column<N>(block.section, i) < C;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          squares += is_in ? (x[i][j] - mean) * (x[i][j] - mean) : 0.0f;
        }
      }
    }
    add_sections(squares, [mean](float value) { return (value - mean) * (value - mean); });
    row_sums.add(squares, unused);
    const float rstd = 1.0f / sqrtf(squares * inverse_width + float(p.eps));
    if (!is_live) continue;
    if (block.section == 0 && threadIdx.x == 0) {
      if (p.layer_norm) static_cast<float*>(p.mean)[dense_row] = mean;
      static_cast<float*>(p.rstd)[dense_row] = rstd;
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
      if (c >= C) continue;
      float scale[N], shift[N];
      if constexpr (kPerToken) {
        modulation[i].scale.values(p.modulation_dtype, scale);
        modulation[i].shift.values(p.modulation_dtype, shift);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        math::Affine<float> affine{factor[i][j], offset[i][j]};
        if constexpr (kPerToken) {
          affine = math::fold_modulation(affine.factor, affine.offset, scale[j], shift[j]);
        }
        x[i][j] = math::modulate(math::normalise(x[i][j], mean, rstd), affine);
      }
      store_values<T>(x[i], p.y, p.x_dtype, dense_row * C + c);
    }
  }
}

// --- backward, first pass

// The partial sums of a chunk: of the norm's, and of the gate's where there is one.
constexpr int kNormSums = 2;

// Grads takes N neighbours of the gradient of the norm's input: Grads::Fetch holds what it needs
// besides, `fetch_row` requests it, `store` turns the gradient into those of the op's inputs and
// adds to the op's own sums.
//
// The norm's sums are of grad and grad * n, where grad is grad_y, or grad_y * (1 + scale) when the
// modulation is per token.
template <typename Grads, bool kPerToken>
__global__ void __launch_bounds__(kPerToken || Grads::N == 1 ? kFewThreads : kMaxThreads, 1)
    norm_bwd_kernel(const typename Grads::Params params, const Tiling tiling) {
  constexpr int N = Grads::N, kPacks = kPerThread / N, kSums = kNormSums + Grads::kSums;
  using T = typename Grads::T;
  __shared__ float storage[2 * RowSums::kSize];
  __shared__ float lanes[kMaxThreads * kPerThread];
  RowSums row_sums(storage);
  const RmsNormModulateGradParams& g = Grads::norm(params);
  const RmsNormModulateParams& p = g.forward;
  const BlockRows<N> block(p, tiling);
  const int C = int(p.C);
  const float inverse_width = 1.0f / float(C);

  // N neighbours of x, grad_y and, per token, scale
  struct Fetch {
    Fetched<T, N> x, grad_y;
    Fetched<AnyDtype, kPerToken ? N : 1> scale;

    __device__ __forceinline__ void fetch(const RmsNormModulateGradParams& g, int64_t image,
                                          int64_t row, int c) {
      const RmsNormModulateParams& p = g.forward;
      x.fetch(p.x, p.x_dtype, image * p.x_image_stride + row * p.x_row_stride + c);
      grad_y.fetch(g.grad_y, p.x_dtype,
                   image * g.grad_y_image_stride + row * g.grad_y_row_stride + c);
      if constexpr (kPerToken) {
        scale.fetch(p.scale, p.modulation_dtype,
                    image * p.scale_image_stride + row * p.scale_row_stride + c);
      }
    }
  };

  int64_t row = block.first + threadIdx.y;
  Fetch next[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = column<N>(block.section, i);
    if (row < block.last && c < C) next[i].fetch(g, block.image, row, c);
  }
  // weight * (1 + scale), for a modulation per token weight
  const auto factors = [&](int c, float (&factor)[N]) {
    FetchedModulation<N> modulation;
    modulation.fetch_affine(p, c);
    if constexpr (!kPerToken) modulation.fetch_scale(p, block.image, 0, c);
    values_or(modulation.weight, p.weight, p.weight_dtype, 1.0f, factor);
    if constexpr (!kPerToken) {
      float scale[N];
      values_or(modulation.scale, p.scale, p.modulation_dtype, 0.0f, scale);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        factor[j] = math::fold_modulation(factor[j], 0.0f, scale[j], 0.0f).factor;
      }
    }
  };
  float factor[kPacks][N], sums[kSums][kPacks][N];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = column<N>(block.section, i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      factor[i][j] = 0.0f;
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) sums[sum][i][j] = 0.0f;
    }
    if (c < C) factors(c, factor[i]);
  }

  // rows of threads without a row stay for the sums
  for (int64_t base = block.first; base < block.last; base += blockDim.y, row += blockDim.y) {
    const bool is_live = row < block.last;
    const int64_t dense_row = block.image * p.rows_per_image + row;
    const float mean =
        is_live && p.layer_norm ? static_cast<const float*>(p.mean)[dense_row] : 0.0f;
    const float rstd = is_live ? static_cast<const float*>(p.rstd)[dense_row] : 0.0f;
    typename Grads::Fetch fetch[kPacks];
    float n[kPacks][N], grad_n[kPacks][N];
    float mean_grad_n = 0.0f, mean_grad_n_n = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
#pragma unroll
      for (int j = 0; j < N; ++j) n[i][j] = grad_n[i][j] = 0.0f;
      if (!is_live || c >= C) continue;
      fetch[i].fetch(params, block.image, row, c);
      next[i].x.values(p.x_dtype, n[i]);
      next[i].grad_y.values(p.x_dtype, grad_n[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) n[i][j] = math::normalise(n[i][j], mean, rstd);
      if constexpr (kPerToken) {
        float scale[N], bias[N], grad_scale[N];
        FetchedModulation<N> affine;
        affine.fetch_affine(p, c);
        values_or(affine.bias, p.bias, p.weight_dtype, 0.0f, bias);
        next[i].scale.values(p.modulation_dtype, scale);
        store_as<N, true>(grad_n[i], g.grad_shift, p.modulation_dtype, dense_row * C + c, N);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          grad_scale[j] = math::modulation_grad_scale(grad_n[i][j], grad_n[i][j] * n[i][j],
                                                      factor[i][j], bias[j]);
          grad_n[i][j] *= 1.0f + scale[j];
        }
        store_as<N, true>(grad_scale, g.grad_scale, p.modulation_dtype, dense_row * C + c, N);
      }
      if (row + blockDim.y < block.last) next[i].fetch(g, block.image, row + blockDim.y, c);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sums[0][i][j] += grad_n[i][j];
        sums[1][i][j] += grad_n[i][j] * n[i][j];
        grad_n[i][j] *= factor[i][j];
        mean_grad_n += grad_n[i][j];
        mean_grad_n_n += grad_n[i][j] * n[i][j];
      }
    }
    for (int section = 0; N == 1 && is_live && section < tiling.sections; ++section) {
      if (section == block.section) continue;
#pragma unroll 1
      for (int i = 0; i < kPacks; ++i) {  // the row's other sections, which other blocks hold
        const int c = column<N>(section, i);
        if (c >= C) continue;
        Fetch other;
        float x[N], grad[N], its_factor[N];
        other.fetch(g, block.image, row, c);
        factors(c, its_factor);
        other.x.values(p.x_dtype, x);
        other.grad_y.values(p.x_dtype, grad);
        if constexpr (kPerToken) {
          float scale[N];
          other.scale.values(p.modulation_dtype, scale);
#pragma unroll
          for (int j = 0; j < N; ++j) its_factor[j] *= 1.0f + scale[j];
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
          mean_grad_n += grad[j] * its_factor[j];
          mean_grad_n_n += grad[j] * its_factor[j] * math::normalise(x[j], mean, rstd);
        }
      }
    }
    row_sums.add(mean_grad_n, mean_grad_n_n);
    mean_grad_n = p.layer_norm ? mean_grad_n * inverse_width : 0.0f;
    mean_grad_n_n *= inverse_width;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
      if (!is_live || c >= C) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        grad_n[i][j] = math::norm_grad_x(grad_n[i][j], n[i][j], rstd, mean_grad_n, mean_grad_n_n);
      }
      if constexpr (Grads::kSums > 0)
        fetch[i].store(params, block.image, row, c, grad_n[i], sums[kNormSums][i]);
      else
        fetch[i].store(params, block.image, row, c, grad_n[i]);
    }
  }

  // the rows of threads, in order
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    float* partials = static_cast<float*>(sum < kNormSums ? g.partials : Grads::partials(params));
    if (partials == nullptr) continue;  // the same for all threads
    const int stride = int(blockDim.x) * int(blockDim.y);
    float* mine = lanes + threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) mine[i * stride] = sums[sum][i / N][i % N];
    __syncthreads();
    if (threadIdx.y != 0) continue;
    const int64_t offset = sum < kNormSums ? (block.chunk * kNormSums + sum) * C : block.chunk * C;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
      float total[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        total[j] = 0.0f;
        for (int y = 0; y < int(blockDim.y); ++y) {
          total[j] += mine[(i * N + j) * stride + y * int(blockDim.x)];
        }
      }
      if (c < C) store<N, true>(total, partials + offset + c, N);
    }
  }
}

// --- backward, second pass

// Partial sums of a gate and where their total goes, or nulls.
struct GateSums {
  const float* partials;
  void* grad_gate;
  DType dtype;
};

// Adds a, b and c of the lanes (threadIdx.y) of a column, in lane order; the result is lane 0's.
template <int kLanes>
__device__ __forceinline__ void lane_sum(float& a, float& b, float& c) {
  __shared__ float lanes[3][kLanes][kColumns];
  lanes[0][threadIdx.y][threadIdx.x] = a;
  lanes[1][threadIdx.y][threadIdx.x] = b;
  lanes[2][threadIdx.y][threadIdx.x] = c;
  __syncthreads();
  a = b = c = 0.0f;
  if (threadIdx.y == 0) {
    for (int lane = 0; lane < kLanes; ++lane) {
      a += lanes[0][lane][threadIdx.x];
      b += lanes[1][lane][threadIdx.x];
      c += lanes[2][lane][threadIdx.x];
    }
  }
  __syncthreads();  // the next call writes lanes
}

// grad_shift, grad_scale and grad_gate (num_images, C) from the chunks of each image. The partials
// of an image's first chunk become the image's part of grad_bias and grad_weight. One block per
// image and kColumns columns.
static __global__ void __launch_bounds__(kColumns* kImageLanes)
    image_grads_kernel(const RmsNormModulateGradParams g, const GateSums gate,
                       int64_t chunks_per_image) {
  const RmsNormModulateParams& p = g.forward;
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool is_in = c < p.C;  // all threads stay for lane_sum
  float* norm_partials = static_cast<float*>(g.partials);
  for (int64_t image = blockIdx.y; image < p.num_images; image += gridDim.y) {
    float sum_grad = 0.0f, sum_grad_n = 0.0f, sum_gate = 0.0f;
    for (int64_t i = threadIdx.y; is_in && i < chunks_per_image; i += kImageLanes) {
      const int64_t chunk = image * chunks_per_image + i;
      if (norm_partials != nullptr) {
        sum_grad += norm_partials[chunk * kNormSums * p.C + c];
        sum_grad_n += norm_partials[(chunk * kNormSums + 1) * p.C + c];
      }
      if (gate.partials != nullptr) sum_gate += gate.partials[chunk * p.C + c];
    }
    lane_sum<kImageLanes>(sum_grad, sum_grad_n, sum_gate);
    if (!is_in || threadIdx.y != 0) continue;
    if (gate.partials != nullptr) {
      store_one(sum_gate, gate.grad_gate, gate.dtype, image * p.C + c);
    }
    if (norm_partials == nullptr) continue;
    float gain = 1.0f;
    if (p.scale != nullptr && !p.per_token) {  // per token it is in the sums already
      const float weight = load_one(p.weight, p.weight_dtype, c, 1.0f);
      const float bias = load_one(p.bias, p.weight_dtype, c, 0.0f);
      gain += load_one(p.scale, p.modulation_dtype, image * p.scale_image_stride + c, 0.0f);
      const float grad_scale = math::modulation_grad_scale(sum_grad, sum_grad_n, weight, bias);
      store_one(sum_grad, g.grad_shift, p.modulation_dtype, image * p.C + c);
      store_one(grad_scale, g.grad_scale, p.modulation_dtype, image * p.C + c);
    }
    float* first = norm_partials + image * chunks_per_image * kNormSums * p.C + c;
    first[0] = gain * sum_grad;
    first[p.C] = gain * sum_grad_n;
  }
}

// grad_weight and grad_bias (C,) from the parts of all images, or, where they have not been added
// up per image, from all chunks: `num_parts` of them, `chunks_per_part` apart. One block per
// kColumns columns.
static __global__ void __launch_bounds__(kColumns* kWeightLanes)
    weight_grads_kernel(const RmsNormModulateGradParams g, int64_t num_parts,
                        int64_t chunks_per_part) {
  const int64_t C = g.forward.C, c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool is_in = c < C;  // all threads stay for lane_sum
  const float* partials = static_cast<const float*>(g.partials);
  float grad_bias = 0.0f, grad_weight = 0.0f, unused = 0.0f;
  for (int64_t part = threadIdx.y; is_in && part < num_parts; part += kWeightLanes) {
    const float* sums = partials + part * chunks_per_part * kNormSums * C + c;
    grad_bias += sums[0];
    grad_weight += sums[C];
  }
  lane_sum<kWeightLanes>(grad_bias, grad_weight, unused);
  if (!is_in || threadIdx.y != 0) return;
  const DType dtype = g.forward.weight_dtype;
  if (g.grad_weight != nullptr) store_one(grad_weight, g.grad_weight, dtype, c);
  if (g.grad_bias != nullptr) store_one(grad_bias, g.grad_bias, dtype, c);
}

// --- launchers

// Blocks of `threads` threads at most: a row of them per row of x, more where rows are narrow.
inline dim3 block_shape(int64_t C, int sections, int threads, int64_t rows_per_chunk) {
  const int64_t per_section = ceil_div(C, int64_t(sections) * kPerThread);
  const int x = int(ceil_div(per_section, kWarpSize) * kWarpSize);
  const int64_t y = threads / x < 1 ? 1 : threads / x;
  return dim3(unsigned(x), unsigned(y < rows_per_chunk ? y : rows_per_chunk));
}

inline Tiling make_tiling(const RmsNormModulateParams& p, int64_t rows_per_chunk, int max_threads) {
  return {rows_per_chunk, ceil_div(p.rows_per_image, rows_per_chunk),
          int(ceil_div(p.C, max_threads * kPerThread))};
}

template <typename Kernel, typename Params>
Status launch_rows(Kernel kernel, const RmsNormModulateParams& p, const Params& params,
                   const Tiling& tiling, int threads, cudaStream_t stream) {
  const int64_t blocks = p.num_images * tiling.chunks_per_image * tiling.sections;
  if (blocks > kMaxBlocks) return "more chunks of rows than a grid holds";
  return launch(kernel, unsigned(blocks),
                block_shape(p.C, tiling.sections, threads, tiling.rows_per_chunk), stream, params,
                tiling);
}

template <typename Rows>
Status launch_norm_fwd(const typename Rows::Params& params, cudaStream_t stream) {
  const RmsNormModulateParams& p = Rows::norm(params);
  Tiling tiling = make_tiling(p, p.rows_per_image, kMaxThreads);
  const dim3 shape = block_shape(p.C, tiling.sections, kForwardThreads, p.rows_per_image);
  tiling = make_tiling(p, int64_t(shape.y) * kForwardRows, kMaxThreads);
  const auto kernel = p.per_token ? norm_fwd_kernel<Rows, true> : norm_fwd_kernel<Rows, false>;
  return launch_rows(kernel, p, params, tiling, kForwardThreads, stream);
}

template <typename Grads>
Status launch_norm_bwd(const typename Grads::Params& params, const GateSums& gate,
                       cudaStream_t stream) {
  const RmsNormModulateGradParams& g = Grads::norm(params);
  const RmsNormModulateParams& p = g.forward;
  const int threads = p.per_token || Grads::N == 1 ? kFewThreads : kMaxThreads;
  const Tiling tiling = make_tiling(p, g.rows_per_chunk, threads);
  const auto kernel = p.per_token ? norm_bwd_kernel<Grads, true> : norm_bwd_kernel<Grads, false>;
  const Status status = launch_rows(kernel, p, params, tiling, threads, stream);
  if (status != nullptr) return status;

  const unsigned column_blocks = unsigned(ceil_div(p.C, kColumns));
  const bool has_image_sums = p.scale != nullptr && !p.per_token && g.partials != nullptr;
  if (has_image_sums || gate.partials != nullptr) {
    const unsigned images =
        unsigned(p.num_images < 65535 ? p.num_images : 65535);  // grid limit in y
    const Status images_status =
        launch(image_grads_kernel, dim3(column_blocks, images), dim3(kColumns, kImageLanes), stream,
               g, gate, tiling.chunks_per_image);
    if (images_status != nullptr) return images_status;
  }
  if (g.grad_weight == nullptr && g.grad_bias == nullptr) return nullptr;
  const bool has_parts = has_image_sums || gate.partials != nullptr;
  return launch(weight_grads_kernel, column_blocks, dim3(kColumns, kWeightLanes), stream, g,
                has_parts ? p.num_images : p.num_images * tiling.chunks_per_image,
                has_parts ? tiling.chunks_per_image : int64_t(1));
}

// Whether rows may be accessed in packs of `pack` elements, by one block: what forward and backward
// both read and write.
inline bool norm_is_aligned(const RmsNormModulateParams& p, int pack,
                            int max_threads = kMaxThreads) {
  return p.C % pack == 0 && p.C <= max_threads * kPerThread &&
         packs_are_aligned(p.x, p.x_dtype, pack, p.x_image_stride, p.x_row_stride) &&
         packs_are_aligned(p.y, p.x_dtype, pack, p.C, 0) &&
         packs_are_aligned(p.shift, p.modulation_dtype, pack, p.shift_image_stride,
                           p.per_token ? p.shift_row_stride : 0) &&
         packs_are_aligned(p.scale, p.modulation_dtype, pack, p.scale_image_stride,
                           p.per_token ? p.scale_row_stride : 0) &&
         packs_are_aligned(p.weight, p.weight_dtype, pack, 0, 0) &&
         packs_are_aligned(p.bias, p.weight_dtype, pack, 0, 0);
}

inline bool norm_grads_are_aligned(const RmsNormModulateGradParams& g, int pack) {
  const RmsNormModulateParams& p = g.forward;
  return norm_is_aligned(p, pack, p.per_token ? kFewThreads : kMaxThreads) &&
         packs_are_aligned(g.grad_y, p.x_dtype, pack, g.grad_y_image_stride, g.grad_y_row_stride) &&
         packs_are_aligned(g.grad_x, p.x_dtype, pack, p.C, 0) &&
         packs_are_aligned(g.grad_shift, p.modulation_dtype, pack, p.C, 0) &&
         packs_are_aligned(g.grad_scale, p.modulation_dtype, pack, p.C, 0);
}

template <typename T_, int N_>
struct PackOf {
  using T = T_;
  static constexpr int N = N_;
};

// Calls fn(PackOf<...>{}): packs of 16 bytes of x's dtype where is_aligned(N), else single
// elements.
template <typename IsAligned, typename Fn>
Status with_packs(const RmsNormModulateParams& p, IsAligned is_aligned, Fn fn) {
  if (p.C < 1 || p.C > kMaxWidth) return "C must be between 1 and 8192";
  if (p.x_dtype == DType::kFloat64) return "x must be fp32, bf16 or fp16";
  if (p.num_images * p.rows_per_image == 0) return nullptr;  // no blocks would be an error
  const int pack = p.x_dtype == DType::kFloat32 ? 4 : 8;
  if (!is_aligned(pack)) return fn(PackOf<AnyDtype, 1>{});
  if (p.x_dtype == DType::kFloat32) return fn(PackOf<float, 4>{});
  if (p.x_dtype == DType::kBFloat16) return fn(PackOf<__nv_bfloat16, 8>{});
  return fn(PackOf<__half, 8>{});
}

}  // namespace pixelgen::cuda
