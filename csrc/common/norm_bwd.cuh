// Backward of a norm with shift and scale: the op says where the gradient of the norm's input goes
// (`Grads`).
//
// The rows of threads of a block add up what they have of a chunk's sums at its end, so a chunk
// writes one partial sum per column; two small kernels add those, in a fixed order.
#pragma once

#include "norm_rows.cuh"

namespace pixelgen::cuda {

// of a block that needs more registers: single elements, or a modulation per token
constexpr int kFewThreads = 256;
// on a GPU a thread adds the rows of a chunk one after the other, and its rounding errors with them
constexpr ChunkRule kBackwardChunks{256, 16, 128};
constexpr int kColumns = 32;      // of the second pass, per block
constexpr int kImageLanes = 8;    // chunks of an image that are added side by side
constexpr int kWeightLanes = 32;  // images that are added side by side

// --- first pass

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
    norm_bwd_kernel(const NormBwd p, const typename Grads::Op op, const Tiling tiling) {
  constexpr int N = Grads::N, kPacks = kPerThread / N, kSums = kNormSums + Grads::kSums;
  using T = typename Grads::T;
  __shared__ float storage[2 * RowSums::kSize];
  __shared__ float lanes[kMaxThreads * kPerThread];
  RowSums row_sums(storage);
  const BlockRows<N> block(p, tiling);
  const int C = int(p.width());
  const float inverse_width = 1.0f / float(C);

  // N neighbours of x, grad_y and, per token, scale
  struct Fetch {
    Fetched<T, N> x, grad_y;
    Fetched<AnyDtype, kPerToken ? N : 1> scale;

    __device__ __forceinline__ void fetch(const NormBwd& p, int64_t image, int64_t row, int c) {
      x.fetch(p.x, p.x.offset(image, row) + c);
      if (p.grad_y.data != nullptr) grad_y.fetch(p.grad_y, p.grad_y.offset(image, row) + c);
      if constexpr (kPerToken) scale.fetch(p.scale, p.scale.row(image, row) + c);
    }
  };

  int64_t row = block.first + threadIdx.y;
  Fetch next[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = column<N>(block.section, i);
    if (row < block.last && c < C) next[i].fetch(p, block.image, row, c);
  }
  // weight * (1 + scale), for a modulation per token weight
  const auto factors = [&](int c, float (&factor)[N]) {
    FetchedModulation<N> modulation;
    modulation.fetch_affine(p, c);
    if constexpr (!kPerToken) modulation.fetch_scale(p, block.image, 0, c);
    values_or(modulation.weight, p.weight, 1.0f, factor);
    if constexpr (!kPerToken) {
      float scale[N];
      values_or(modulation.scale, p.scale, 0.0f, scale);
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
    const int64_t dense_row = block.image * p.rows_per_image() + row;
    const float mean = is_live && p.is_layer_norm() ? p.mean.as<float>()[dense_row] : 0.0f;
    const float rstd = is_live ? p.rstd.as<float>()[dense_row] : 0.0f;
    typename Grads::Fetch fetch[kPacks];
    float n[kPacks][N], grad_n[kPacks][N];
    float mean_grad_n = 0.0f, mean_grad_n_n = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
#pragma unroll
      for (int j = 0; j < N; ++j) n[i][j] = grad_n[i][j] = 0.0f;
      if (!is_live || c >= C) continue;
      fetch[i].fetch(p, op, block.image, row, c);
      next[i].x.values(p.x.dtype, n[i]);
      values_or(next[i].grad_y, p.grad_y, 0.0f, grad_n[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) n[i][j] = math::normalise(n[i][j], mean, rstd);
      if constexpr (kPerToken) {
        float scale[N], bias[N], grad_scale[N];
        FetchedModulation<N> affine;
        affine.fetch_affine(p, c);
        values_or(affine.bias, p.bias, 0.0f, bias);
        next[i].scale.values(p.scale.dtype, scale);
        store_values<AnyDtype>(grad_n[i], p.grad_shift, dense_row * C + c);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          grad_scale[j] = math::modulation_grad_scale(grad_n[i][j], grad_n[i][j] * n[i][j],
                                                      factor[i][j], bias[j]);
          grad_n[i][j] *= 1.0f + scale[j];
        }
        store_values<AnyDtype>(grad_scale, p.grad_scale, dense_row * C + c);
      }
      if (row + blockDim.y < block.last) next[i].fetch(p, block.image, row + blockDim.y, c);
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
        other.fetch(p, block.image, row, c);
        factors(c, its_factor);
        other.x.values(p.x.dtype, x);
        values_or(other.grad_y, p.grad_y, 0.0f, grad);
        if constexpr (kPerToken) {
          float scale[N];
          other.scale.values(p.scale.dtype, scale);
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
    mean_grad_n = p.is_layer_norm() ? mean_grad_n * inverse_width : 0.0f;
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
        fetch[i].store(p, op, block.image, row, c, grad_n[i], sums[kNormSums][i]);
      else
        fetch[i].store(p, op, block.image, row, c, grad_n[i]);
    }
  }

  // the rows of threads, in order
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    float* partials = static_cast<float*>(sum < kNormSums ? p.partials : p.own_partials);
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

// --- second pass

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

// grad_shift, grad_scale and the op's own gradient (num_images, C) from the chunks of each image.
// The partials of an image's first chunk become the image's part of grad_bias and grad_weight. One
// block per image and kColumns columns.
static __global__ void __launch_bounds__(kColumns* kImageLanes)
    image_grads_kernel(const NormBwd p, const Dense own_grad, int64_t chunks_per_image) {
  const int64_t C = p.width(), c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool is_in = c < C;  // all threads stay for lane_sum
  float* norm_partials = static_cast<float*>(p.partials);
  const float* own_partials = static_cast<const float*>(p.own_partials);
  for (int64_t image = blockIdx.y; image < p.num_images(); image += gridDim.y) {
    float sum_grad = 0.0f, sum_grad_n = 0.0f, own_sum = 0.0f;
    for (int64_t i = threadIdx.y; is_in && i < chunks_per_image; i += kImageLanes) {
      const int64_t chunk = image * chunks_per_image + i;
      if (norm_partials != nullptr) {
        sum_grad += norm_partials[chunk * kNormSums * C + c];
        sum_grad_n += norm_partials[(chunk * kNormSums + 1) * C + c];
      }
      if (own_partials != nullptr) own_sum += own_partials[chunk * C + c];
    }
    lane_sum<kImageLanes>(sum_grad, sum_grad_n, own_sum);
    if (!is_in || threadIdx.y != 0) continue;
    if (own_partials != nullptr) store_one(own_sum, own_grad.data, own_grad.dtype, image * C + c);
    if (norm_partials == nullptr) continue;
    float gain = 1.0f;
    if (p.has_shared_modulation()) {  // per token it is in the sums already
      const float weight = load_one(p.weight.data, p.weight.dtype, c, 1.0f);
      const float bias = load_one(p.bias.data, p.bias.dtype, c, 0.0f);
      gain += load_one(p.scale.data, p.scale.dtype, p.scale.row(image, 0) + c, 0.0f);
      const float grad_scale = math::modulation_grad_scale(sum_grad, sum_grad_n, weight, bias);
      store_one(sum_grad, p.grad_shift.data, p.shift.dtype, image * C + c);
      store_one(grad_scale, p.grad_scale.data, p.scale.dtype, image * C + c);
    }
    float* first = norm_partials + image * chunks_per_image * kNormSums * C + c;
    first[0] = gain * sum_grad;
    first[C] = gain * sum_grad_n;
  }
}

// grad_weight and grad_bias (C,) from the parts of all images, or, where they have not been added
// up per image, from all chunks: `num_parts` of them, `chunks_per_part` apart. One block per
// kColumns columns.
static __global__ void __launch_bounds__(kColumns* kWeightLanes)
    weight_grads_kernel(const NormBwd p, int64_t num_parts, int64_t chunks_per_part) {
  const int64_t C = p.width(), c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool is_in = c < C;  // all threads stay for lane_sum
  const float* partials = static_cast<const float*>(p.partials);
  float grad_bias = 0.0f, grad_weight = 0.0f, unused = 0.0f;
  for (int64_t part = threadIdx.y; is_in && part < num_parts; part += kWeightLanes) {
    const float* sums = partials + part * chunks_per_part * kNormSums * C + c;
    grad_bias += sums[0];
    grad_weight += sums[C];
  }
  lane_sum<kWeightLanes>(grad_bias, grad_weight, unused);
  if (!is_in || threadIdx.y != 0) return;
  store_one(grad_weight, p.grad_weight.data, p.weight.dtype, c);
  if (p.bias.data != nullptr) store_one(grad_bias, p.grad_bias.data, p.bias.dtype, c);
}

// --- launchers

inline bool norm_grads_are_packed(const NormBwd& p, int pack) {
  return norm_is_packed(p, pack, p.scale.per_row ? kFewThreads : kMaxThreads) &&
         is_packed(p.grad_y, pack) && is_packed(p.grad_x, pack, p.width()) &&
         is_packed(p.grad_shift, pack, p.width()) && is_packed(p.grad_scale, pack, p.width());
}

// own_grad: what p.own_partials add up to, or empty.
template <typename Grads>
Status launch_norm_bwd(const NormBwd& p, const typename Grads::Op& op, const Dense& own_grad,
                       const Place& place) {
  const int threads = p.scale.per_row || Grads::N == 1 ? kFewThreads : kMaxThreads;
  const Tiling tiling = make_tiling(p, p.rows_per_chunk, threads);
  const auto kernel =
      p.scale.per_row ? norm_bwd_kernel<Grads, true> : norm_bwd_kernel<Grads, false>;
  Status status = launch_rows(kernel, p, op, tiling, threads, place);
  if (status != nullptr) return status;

  const unsigned column_blocks = unsigned(ceil_div(p.width(), kColumns));
  const bool has_image_sums = p.has_shared_modulation() || p.own_partials != nullptr;
  if (has_image_sums) {
    const unsigned images =
        unsigned(p.num_images() < 65535 ? p.num_images() : 65535);  // grid limit in y
    status = launch(image_grads_kernel, dim3(column_blocks, images), dim3(kColumns, kImageLanes),
                    place, p, own_grad, tiling.chunks_per_image);
  }
  if (status != nullptr || p.weight.data == nullptr) return status;
  return launch(weight_grads_kernel, column_blocks, dim3(kColumns, kWeightLanes), place, p,
                has_image_sums ? p.num_images() : p.num_images() * tiling.chunks_per_image,
                has_image_sums ? tiling.chunks_per_image : int64_t(1));
}

}  // namespace pixelgen::cuda
