// Bound by bytes. A row belongs to the threads that share threadIdx.y; each thread holds kPerThread
// of its elements in registers, so x is read once and y written once (backward: x and grad_y read,
// grad_x written). Shift and scale are read once per row and come from L1 or L2 for all but the
// first row of an image.
//
// Backward: one block per chunk of rows of one image, which adds up its rows in registers, in
// order, and writes one partial sum per column. Two small kernels then add the partials, in a fixed
// order.
#include "../math/norm.h"
#include "../rms_norm_modulate.h"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kPerThread = 8;  // elements of a row in one thread of forward
constexpr int kMaxThreads = kMaxWidth / kPerThread;
constexpr int kForwardThreads = 128;  // smallest block of forward; narrow rows share one
// Backward needs more than the 64 registers that 1024 threads would leave, so wide rows have more
// elements per thread.
constexpr int kMaxBackwardThreads = 512;
constexpr int kPerThreadNarrow = 8, kPerThreadWide = 16;
constexpr int kColumns = 32;         // of the second pass of backward, per block: 128 bytes of fp32
constexpr int kModulationLanes = 8;  // chunks of an image that are added side by side
constexpr int kWeightLanes = 32;     // chunks of all images that are added side by side

// --- forward

template <typename T, int kPack, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_modulate_fwd_kernel(const RmsNormModulateParams p) {
  constexpr int kPacks = kPerThread / kPack;
  __shared__ float partials[2 * kMaxThreads / kWarpSize];
  const int C = int(p.C);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool is_live = row < p.num_images * p.rows_per_image;  // all threads stay for row_sum
  const int64_t image = is_live ? row / p.rows_per_image : 0;
  const int64_t row_of_image = is_live ? row % p.rows_per_image : 0;
  const T* x_row =
      static_cast<const T*>(p.x) + image * p.x_image_stride + row_of_image * p.x_row_stride;

  float x[kPacks][kPack];
  float sum = 0.0f, squares = 0.0f, unused = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * kPack;
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[i][j] = 0.0f;
    if (is_live && c < C) load<kPack, kAligned>(x_row + c, C - c, x[i]);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      sum += x[i][j];
      squares += x[i][j] * x[i][j];
    }
  }
  float mean = 0.0f;
  if (p.layer_norm) {
    row_sum(sum, unused, partials);
    mean = sum / float(C);
    squares = 0.0f;  // around the mean: the difference of two large sums would lose digits
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = (i * blockDim.x + threadIdx.x) * kPack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        squares += c + j < C ? (x[i][j] - mean) * (x[i][j] - mean) : 0.0f;
      }
    }
  }
  row_sum(squares, unused, partials);
  const float rstd = 1.0f / sqrtf(squares / float(C) + float(p.eps));
  if (!is_live) return;  // no block-wide sum below
  if (threadIdx.x == 0) {
    if (p.layer_norm) static_cast<float*>(p.mean)[row] = mean;
    static_cast<float*>(p.rstd)[row] = rstd;
  }

  const int64_t row_of_modulation = p.per_token ? row_of_image : 0;
  const int64_t scale_offset =
      image * p.scale_image_stride + row_of_modulation * p.scale_row_stride;
  const int64_t shift_offset =
      image * p.shift_image_stride + row_of_modulation * p.shift_row_stride;
  T* y_row = static_cast<T*>(p.y) + row * C;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * kPack;
    if (c >= C) continue;
    float weight[kPack], bias[kPack], scale[kPack], shift[kPack];
    load_as<kPack, kAligned>(p.weight, p.weight_dtype, c, C - c, 1.0f, weight);
    load_as<kPack, kAligned>(p.bias, p.weight_dtype, c, C - c, 0.0f, bias);
    load_as<kPack, kAligned>(p.scale, p.modulation_dtype, scale_offset + c, C - c, 0.0f, scale);
    load_as<kPack, kAligned>(p.shift, p.modulation_dtype, shift_offset + c, C - c, 0.0f, shift);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      x[i][j] = math::modulate(math::normalise(x[i][j], mean, rstd),
                               math::fold_modulation(weight[j], bias[j], scale[j], shift[j]));
    }
    store<kPack, kAligned>(x[i], y_row + c, C - c);
  }
}

// --- backward, first pass

// grad_x; for a modulation per token grad_shift and grad_scale too; and the chunk's sums of grad
// and grad * n, where grad is grad_y, or grad_y * (1 + scale) when the modulation is per token.
template <typename T, int kPack, bool kAligned, int kPerThread, bool kPerToken>
__global__ void __launch_bounds__(kMaxBackwardThreads)
    rms_norm_modulate_bwd_kernel(const RmsNormModulateGradParams g, int64_t chunks_per_image) {
  constexpr int kPacks = kPerThread / kPack;
  __shared__ float partials[2 * kMaxBackwardThreads / kWarpSize];
  const RmsNormModulateParams& p = g.forward;
  const int C = int(p.C);
  const int64_t image = blockIdx.x / chunks_per_image;
  const int64_t first = blockIdx.x % chunks_per_image * g.rows_per_chunk;
  const int64_t last = min(first + g.rows_per_chunk, p.rows_per_image);

  float factor[kPacks][kPack];  // weight * (1 + scale), for a modulation per token weight
  float sum_grad[kPacks][kPack], sum_grad_n[kPacks][kPack];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * kPack;
#pragma unroll
    for (int j = 0; j < kPack; ++j) factor[i][j] = sum_grad[i][j] = sum_grad_n[i][j] = 0.0f;
    if (c >= C) continue;
    load_as<kPack, kAligned>(p.weight, p.weight_dtype, c, C - c, 1.0f, factor[i]);
    if constexpr (!kPerToken) {
      float scale[kPack];
      load_as<kPack, kAligned>(p.scale, p.modulation_dtype, image * p.scale_image_stride + c, C - c,
                               0.0f, scale);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        factor[i][j] = math::fold_modulation(factor[i][j], 0.0f, scale[j], 0.0f).factor;
      }
    }
  }

  for (int64_t row_of_image = first; row_of_image < last;
       ++row_of_image) {  // the same for all threads
    const int64_t row = image * p.rows_per_image + row_of_image;
    const T* x_row =
        static_cast<const T*>(p.x) + image * p.x_image_stride + row_of_image * p.x_row_stride;
    const T* grad_y_row = static_cast<const T*>(g.grad_y) + image * g.grad_y_image_stride +
                          row_of_image * g.grad_y_row_stride;
    const float mean = p.layer_norm ? static_cast<const float*>(p.mean)[row] : 0.0f;
    const float rstd = static_cast<const float*>(p.rstd)[row];

    float n[kPacks][kPack], grad_n[kPacks][kPack];
    float mean_grad_n = 0.0f, mean_grad_n_n = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = (i * blockDim.x + threadIdx.x) * kPack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) n[i][j] = grad_n[i][j] = 0.0f;
      if (c >= C) continue;
      load<kPack, kAligned>(x_row + c, C - c, n[i]);
      load<kPack, kAligned>(grad_y_row + c, C - c, grad_n[i]);
#pragma unroll
      for (int j = 0; j < kPack; ++j) n[i][j] = math::normalise(n[i][j], mean, rstd);
      if constexpr (kPerToken) {
        float scale[kPack], bias[kPack], grad_scale[kPack];
        load_as<kPack, kAligned>(
            p.scale, p.modulation_dtype,
            image * p.scale_image_stride + row_of_image * p.scale_row_stride + c, C - c, 0.0f,
            scale);
        load_as<kPack, kAligned>(p.bias, p.weight_dtype, c, C - c, 0.0f, bias);
        store_as<kPack, kAligned>(grad_n[i], g.grad_shift, p.modulation_dtype, row * C + c, C - c);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          grad_scale[j] = math::modulation_grad_scale(grad_n[i][j], grad_n[i][j] * n[i][j],
                                                      factor[i][j], bias[j]);
          grad_n[i][j] *= 1.0f + scale[j];
        }
        store_as<kPack, kAligned>(grad_scale, g.grad_scale, p.modulation_dtype, row * C + c, C - c);
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        sum_grad[i][j] += grad_n[i][j];
        sum_grad_n[i][j] += grad_n[i][j] * n[i][j];
        grad_n[i][j] *= factor[i][j];
        mean_grad_n += grad_n[i][j];
        mean_grad_n_n += grad_n[i][j] * n[i][j];
      }
    }
    row_sum(mean_grad_n, mean_grad_n_n, partials);
    mean_grad_n = p.layer_norm ? mean_grad_n / float(C) : 0.0f;
    mean_grad_n_n /= float(C);

    T* grad_x_row = static_cast<T*>(g.grad_x) + row * C;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = (i * blockDim.x + threadIdx.x) * kPack;
      if (c >= C) continue;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        grad_n[i][j] = math::norm_grad_x(grad_n[i][j], n[i][j], rstd, mean_grad_n, mean_grad_n_n);
      }
      store<kPack, kAligned>(grad_n[i], grad_x_row + c, C - c);
    }
  }

  if (g.partials == nullptr) return;
  float* chunk = static_cast<float*>(g.partials) + int64_t(blockIdx.x) * 2 * C;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * kPack;
    if (c >= C) continue;
    store<kPack, kAligned>(sum_grad[i], chunk + c, C - c);
    store<kPack, kAligned>(sum_grad_n[i], chunk + C + c, C - c);
  }
}

// --- backward, second pass

// Adds a and b of the lanes (threadIdx.y) of a column, in lane order; the result is lane 0's.
template <int kLanes>
__device__ __forceinline__ void lane_sum(float& a, float& b) {
  __shared__ float lanes[2][kLanes][kColumns];
  lanes[0][threadIdx.y][threadIdx.x] = a;
  lanes[1][threadIdx.y][threadIdx.x] = b;
  __syncthreads();
  a = b = 0.0f;
  if (threadIdx.y == 0) {
    for (int lane = 0; lane < kLanes; ++lane) {
      a += lanes[0][lane][threadIdx.x];
      b += lanes[1][lane][threadIdx.x];
    }
  }
  __syncthreads();  // the next call writes lanes
}

// grad_shift and grad_scale (num_images, C) from the chunks of each image. One block per image and
// kColumns columns.
__global__ void __launch_bounds__(kColumns* kModulationLanes)
    modulation_grads_kernel(const RmsNormModulateGradParams g, int64_t chunks_per_image) {
  const RmsNormModulateParams& p = g.forward;
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool is_in = c < p.C;  // all threads stay for lane_sum
  const float* partials = static_cast<const float*>(g.partials);
  for (int64_t image = blockIdx.y; image < p.num_images; image += gridDim.y) {
    float sum_grad = 0.0f, sum_grad_n = 0.0f;
    for (int64_t chunk = threadIdx.y; is_in && chunk < chunks_per_image;
         chunk += kModulationLanes) {
      const float* sums = partials + (image * chunks_per_image + chunk) * 2 * p.C + c;
      sum_grad += sums[0];
      sum_grad_n += sums[p.C];
    }
    lane_sum<kModulationLanes>(sum_grad, sum_grad_n);
    if (!is_in || threadIdx.y != 0) continue;
    const float weight = load_one(p.weight, p.weight_dtype, c, 1.0f);
    const float bias = load_one(p.bias, p.weight_dtype, c, 0.0f);
    const float grad_scale = math::modulation_grad_scale(sum_grad, sum_grad_n, weight, bias);
    store_one(sum_grad, g.grad_shift, p.modulation_dtype, image * p.C + c);
    store_one(grad_scale, g.grad_scale, p.modulation_dtype, image * p.C + c);
  }
}

// grad_weight and grad_bias (C,) from the chunks of all images. One block per kColumns columns.
__global__ void __launch_bounds__(kColumns* kWeightLanes)
    weight_grads_kernel(const RmsNormModulateGradParams g, int64_t chunks_per_image) {
  const RmsNormModulateParams& p = g.forward;
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool is_in = c < p.C;  // all threads stay for lane_sum
  const void* shared_scale =
      p.per_token ? nullptr : p.scale;  // per token it is in the sums already
  const float* partials = static_cast<const float*>(g.partials);
  float grad_bias = 0.0f, grad_weight = 0.0f;
  for (int64_t chunk = threadIdx.y; is_in && chunk < p.num_images * chunks_per_image;
       chunk += kWeightLanes) {
    const float scale = load_one(shared_scale, p.modulation_dtype,
                                 chunk / chunks_per_image * p.scale_image_stride + c, 0.0f);
    const float* sums = partials + chunk * 2 * p.C + c;
    grad_bias += (1.0f + scale) * sums[0];
    grad_weight += (1.0f + scale) * sums[p.C];
  }
  lane_sum<kWeightLanes>(grad_bias, grad_weight);
  if (!is_in || threadIdx.y != 0) return;
  if (g.grad_weight != nullptr) store_one(grad_weight, g.grad_weight, p.weight_dtype, c);
  if (g.grad_bias != nullptr) store_one(grad_bias, g.grad_bias, p.weight_dtype, c);
}

// --- launchers

int threads_per_row(int64_t C, int per_thread) {
  return int(ceil_div(ceil_div(C, per_thread), kWarpSize) * kWarpSize);
}

// Whether rows may be accessed in packs of `pack` elements by forward and backward.
bool is_aligned(const RmsNormModulateParams& p, int pack) {
  return p.C % pack == 0 &&
         packs_are_aligned(p.x, p.x_dtype, pack, p.x_image_stride, p.x_row_stride) &&
         packs_are_aligned(p.y, p.x_dtype, pack, p.C, 0) &&
         packs_are_aligned(p.shift, p.modulation_dtype, pack, p.shift_image_stride,
                           p.shift_row_stride) &&
         packs_are_aligned(p.scale, p.modulation_dtype, pack, p.scale_image_stride,
                           p.scale_row_stride) &&
         packs_are_aligned(p.weight, p.weight_dtype, pack, 0, 0) &&
         packs_are_aligned(p.bias, p.weight_dtype, pack, 0, 0);
}

template <typename T, int kPack, bool kAligned>
Status launch_fwd(const RmsNormModulateParams& p, cudaStream_t stream) {
  const int threads = threads_per_row(p.C, kPerThread);
  const int rows = threads < kForwardThreads ? kForwardThreads / threads : 1;
  const int64_t blocks = ceil_div(p.num_images * p.rows_per_image, rows);
  if (blocks > kMaxBlocks) return "more rows than a grid holds";
  return launch(rms_norm_modulate_fwd_kernel<T, kPack, kAligned>, unsigned(blocks),
                dim3(threads, rows), stream, p);
}

template <typename T>
Status launch_fwd_any(const RmsNormModulateParams& p, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  if (is_aligned(p, kPack)) return launch_fwd<T, kPack, true>(p, stream);
  return launch_fwd<T, kPack, false>(p, stream);
}

template <typename T, int kPack, bool kAligned, int kElements>
Status launch_bwd_rows(const RmsNormModulateGradParams& g, int64_t chunks_per_image,
                       cudaStream_t stream) {
  const int64_t blocks = g.forward.num_images * chunks_per_image;
  if (blocks > kMaxBlocks) return "more chunks of rows than a grid holds";
  const int threads = threads_per_row(g.forward.C, kElements);
  return launch(g.forward.per_token
                    ? rms_norm_modulate_bwd_kernel<T, kPack, kAligned, kElements, true>
                    : rms_norm_modulate_bwd_kernel<T, kPack, kAligned, kElements, false>,
                unsigned(blocks), threads, stream, g, chunks_per_image);
}

template <typename T, int kPack, bool kAligned>
Status launch_bwd(const RmsNormModulateGradParams& g, cudaStream_t stream) {
  const RmsNormModulateParams& p = g.forward;
  const int64_t chunks_per_image = ceil_div(p.rows_per_image, g.rows_per_chunk);
  const bool is_narrow = p.C <= kMaxBackwardThreads * kPerThreadNarrow;
  const Status rows_status =
      is_narrow ? launch_bwd_rows<T, kPack, kAligned, kPerThreadNarrow>(g, chunks_per_image, stream)
                : launch_bwd_rows<T, kPack, kAligned, kPerThreadWide>(g, chunks_per_image, stream);
  if (rows_status != nullptr || g.partials == nullptr) return rows_status;

  const unsigned column_blocks = unsigned(ceil_div(p.C, kColumns));
  if (p.scale != nullptr && !p.per_token) {
    const unsigned images =
        unsigned(p.num_images < 65535 ? p.num_images : 65535);  // grid limit in y
    const Status status = launch(modulation_grads_kernel, dim3(column_blocks, images),
                                 dim3(kColumns, kModulationLanes), stream, g, chunks_per_image);
    if (status != nullptr) return status;
  }
  if (g.grad_weight != nullptr || g.grad_bias != nullptr) {
    return launch(weight_grads_kernel, column_blocks, dim3(kColumns, kWeightLanes), stream, g,
                  chunks_per_image);
  }
  return nullptr;
}

template <typename T>
Status launch_bwd_any(const RmsNormModulateGradParams& g, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  const RmsNormModulateParams& p = g.forward;
  if (is_aligned(p, kPack) &&
      packs_are_aligned(g.grad_y, p.x_dtype, kPack, g.grad_y_image_stride, g.grad_y_row_stride) &&
      packs_are_aligned(g.grad_x, p.x_dtype, kPack, p.C, 0) &&
      packs_are_aligned(g.grad_shift, p.modulation_dtype, kPack, p.C, 0) &&
      packs_are_aligned(g.grad_scale, p.modulation_dtype, kPack, p.C, 0)) {
    return launch_bwd<T, kPack, true>(g, stream);
  }
  return launch_bwd<T, kPack, false>(g, stream);
}

}  // namespace

Status rms_norm_modulate_fwd(const RmsNormModulateParams& p, void* stream) {
  if (p.C < 1 || p.C > kMaxWidth) return "C must be between 1 and 8192";
  if (p.num_images * p.rows_per_image == 0) return nullptr;  // no blocks would be an error
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.x_dtype) {
    case DType::kFloat32:
      return launch_fwd_any<float>(p, cuda_stream);
    case DType::kBFloat16:
      return launch_fwd_any<__nv_bfloat16>(p, cuda_stream);
    case DType::kFloat16:
      return launch_fwd_any<__half>(p, cuda_stream);
    default:
      return "x must be fp32, bf16 or fp16";
  }
}

Status rms_norm_modulate_bwd(const RmsNormModulateGradParams& g, void* stream) {
  const RmsNormModulateParams& p = g.forward;
  if (p.C < 1 || p.C > kMaxWidth) return "C must be between 1 and 8192";
  if (p.num_images * p.rows_per_image == 0) return nullptr;  // no blocks would be an error
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.x_dtype) {
    case DType::kFloat32:
      return launch_bwd_any<float>(g, cuda_stream);
    case DType::kBFloat16:
      return launch_bwd_any<__nv_bfloat16>(g, cuda_stream);
    case DType::kFloat16:
      return launch_bwd_any<__half>(g, cuda_stream);
    default:
      return "x must be fp32, bf16 or fp16";
  }
}

}  // namespace pixelgen::cuda
