// Bound by bytes: pred and target are read once (backward: and each wanted gradient written once).
// One warp per token; a block has a chunk of one sample's tokens.
#include "../cosine_distance.h"
#include "../math/distance.h"
#include "distances.cuh"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// fn(pred, target, d) with kN neighbours at a time of the elements of a token that are this
// thread's.
template <typename T, int kN, typename Fn>
__device__ __forceinline__ void for_token(const CosineDistanceParams& p, int64_t b, int64_t token,
                                          Fn fn) {
  const T* pred = static_cast<const T*>(p.pred) + b * p.pred_stride_b + token * p.pred_stride_t;
  const int64_t target = b * p.target_stride_b + token * p.target_stride_t;
#pragma unroll 2
  for (int64_t d = threadIdx.x * kN; d < p.D; d += kWarpSize * kN) {
    // raw until target is there too: the two loads overlap
    const Pack<T, kN> raw = *reinterpret_cast<const Pack<T, kN>*>(pred + d * p.pred_stride_d);
    float u[kN], v[kN];
    load_as<kN, true>(p.target, p.target_dtype, target + d * p.target_stride_d, kN, 0.0f, v);
#pragma unroll
    for (int i = 0; i < kN; ++i) u[i] = to_float(raw.values[i]);
    fn(u, v, d);
  }
}

// threadIdx.y is a token.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 2)
    chunk_sums_kernel(const CosineDistanceParams p, int64_t chunks) {
  __shared__ double distances[kWarps];
  const int64_t b = blockIdx.x / chunks, begin = blockIdx.x % chunks * p.tokens_per_chunk;
  const int64_t end = min(begin + p.tokens_per_chunk, p.T);
  float* statistics = static_cast<float*>(p.statistics) + 3 * p.T * b;
  double distance = 0.0;
  for (int64_t token = begin + threadIdx.y; token < end; token += kWarps) {
    float pred_square = 0.0f, target_square = 0.0f, product = 0.0f;
    for_token<T, kN>(p, b, token, [&](const float (&u)[kN], const float (&v)[kN], int64_t) {
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        pred_square += u[i] * u[i];
        target_square += v[i] * v[i];
        product += u[i] * v[i];
      }
    });
    pred_square = warp_sum(pred_square);
    target_square = warp_sum(target_square);
    product = warp_sum(product);
    const float pred_norm = sqrtf(pred_square), target_norm = sqrtf(target_square);
    // fp64: where pred and target are parallel, what is left of 1 - cosine is the rounding
    double cosine = product;
    if (pred_norm != 0.0f && target_norm != 0.0f) {
      const double eps = p.eps;
      cosine /= (pred_norm < eps ? eps : double(pred_norm)) *
                (target_norm < eps ? eps : double(target_norm));
    }
    distance += 1.0 - cosine;
    if (threadIdx.x == 0) {
      statistics[token] = pred_norm;
      statistics[p.T + token] = target_norm;
      statistics[2 * p.T + token] = float(cosine);
    }
  }
  if (threadIdx.x == 0) distances[threadIdx.y] = distance;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    double sum = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) sum += distances[warp];
    static_cast<float*>(p.partials)[blockIdx.x] = float(sum);
  }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 2)
    grads_kernel(const CosineDistanceGradParams g, int64_t chunks) {
  const CosineDistanceParams& p = g.forward;
  const int64_t b = blockIdx.x / chunks, begin = blockIdx.x % chunks * p.tokens_per_chunk;
  const int64_t end = min(begin + p.tokens_per_chunk, p.T);
  const float* statistics = static_cast<const float*>(p.statistics) + 3 * p.T * b;
  const double grad =
      load_one(g.grad_distance, g.grad_distance_dtype, b * g.grad_distance_stride, 0.0f);
  const float factor = float(grad / double(p.T)), eps = float(p.eps);
  for (int64_t token = begin + threadIdx.y; token < end; token += kWarps) {
    const float pred_norm = statistics[token], target_norm = statistics[p.T + token];
    const float cosine = statistics[2 * p.T + token];
    const auto of_pred = math::cosine_factors(pred_norm, target_norm, cosine, eps, factor);
    const auto of_target = math::cosine_factors(target_norm, pred_norm, cosine, eps, factor);
    const int64_t row = (b * p.T + token) * p.D;
    for_token<T, kN>(p, b, token, [&](const float (&u)[kN], const float (&v)[kN], int64_t d) {
      float out[kN];
      if (g.grad_pred != nullptr) {
#pragma unroll
        for (int i = 0; i < kN; ++i) out[i] = math::cosine_grad(u[i], v[i], of_pred);
        store<kN, true>(out, static_cast<T*>(g.grad_pred) + row + d, kN);
      }
      if (g.grad_target != nullptr) {
#pragma unroll
        for (int i = 0; i < kN; ++i) out[i] = math::cosine_grad(v[i], u[i], of_target);
        store_as<kN, true>(out, g.grad_target, p.target_dtype, row + d, kN);
      }
    });
  }
}

// Whether neighbours may be read as packs of N.
bool is_packed(const CosineDistanceParams& p, int N) {
  return p.pred_stride_d == 1 && p.target_stride_d == 1 && p.D % N == 0 &&
         packs_are_aligned(p.pred, p.pred_dtype, N, p.pred_stride_b, p.pred_stride_t) &&
         packs_are_aligned(p.target, p.target_dtype, N, p.target_stride_b, p.target_stride_t);
}

template <typename T>
Status launch_fwd(const CosineDistanceParams& p, int64_t chunks, cudaStream_t stream) {
  constexpr int kN = 16 / sizeof(T);
  return launch(is_packed(p, kN) ? chunk_sums_kernel<T, kN> : chunk_sums_kernel<T, 1>,
                unsigned(p.B * chunks), dim3(kWarpSize, kWarps), stream, p, chunks);
}

template <typename T>
Status launch_bwd(const CosineDistanceGradParams& g, int64_t chunks, cudaStream_t stream) {
  constexpr int kN = 16 / sizeof(T);
  const CosineDistanceParams& p = g.forward;
  const bool packed = is_packed(p, kN) &&
                      packs_are_aligned(g.grad_pred, p.pred_dtype, kN, p.D, 0) &&
                      packs_are_aligned(g.grad_target, p.target_dtype, kN, p.D, 0);
  return launch(packed ? grads_kernel<T, kN> : grads_kernel<T, 1>, unsigned(p.B * chunks),
                dim3(kWarpSize, kWarps), stream, g, chunks);
}

// Chunks of one sample, or why there are none.
Status count_chunks(const CosineDistanceParams& p, int64_t* chunks) {
  if (p.pred_dtype == DType::kFloat64 || p.target_dtype == DType::kFloat64) {
    return "pred and target must be fp32, bf16 or fp16";
  }
  *chunks = ceil_div(p.T, p.tokens_per_chunk);
  return p.B * *chunks > kMaxBlocks ? "more chunks of tokens than a grid holds" : nullptr;
}

}  // namespace

Status cosine_distance_fwd(const CosineDistanceParams& p, void* stream) {
  if (p.B == 0) return nullptr;  // no blocks would be an error
  int64_t chunks = 0;
  Status status = count_chunks(p, &chunks);
  if (status != nullptr) return status;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.pred_dtype) {
    case DType::kFloat32:
      status = launch_fwd<float>(p, chunks, cuda_stream);
      break;
    case DType::kBFloat16:
      status = launch_fwd<__nv_bfloat16>(p, chunks, cuda_stream);
      break;
    default:
      status = launch_fwd<__half>(p, chunks, cuda_stream);
  }
  if (status != nullptr) return status;
  return launch_chunk_means(p.partials, p.distance, p.B, chunks, p.T, cuda_stream);
}

Status cosine_distance_bwd(const CosineDistanceGradParams& g, void* stream) {
  const CosineDistanceParams& p = g.forward;
  if (p.B == 0) return nullptr;
  int64_t chunks = 0;
  const Status status = count_chunks(p, &chunks);
  if (status != nullptr) return status;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.pred_dtype) {
    case DType::kFloat32:
      return launch_bwd<float>(g, chunks, cuda_stream);
    case DType::kBFloat16:
      return launch_bwd<__nv_bfloat16>(g, chunks, cuda_stream);
    default:
      return launch_bwd<__half>(g, chunks, cuda_stream);
  }
}

}  // namespace pixelgen::cuda
