// Bound by bytes: x_pred and x are read once (backward: and grad_x_pred written once). One block
// adds up one chunk of one sample; a second kernel, one warp per sample, adds the chunks' sums in a
// fixed order.
#include "../flow_matching_loss.h"
#include "../math/flow.h"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxWidthOfToken = 0x7fffffff;

// fn(x_pred, x, element, count) with kN neighbours at a time of the chunk of this block; `element`
// is their place in the sample.
template <typename T, int kN, typename Fn>
__device__ __forceinline__ void for_chunk(const FlowMatchingLossParams& p, int64_t b, int64_t begin,
                                          Fn fn) {
  const int64_t size = p.T * p.D;
  const int64_t end = min(begin + p.elements_per_chunk, size);
  const T* x_pred_sample = static_cast<const T*>(p.x_pred) + b * p.x_pred_stride_b;
  // one division of 64 bits per block; D fits 32 where there are several tokens
  const int64_t first_token = begin / p.D;
  const unsigned first_d = unsigned(begin - first_token * p.D);
  for (int64_t element = begin + threadIdx.x * kN; element < end; element += kThreads * kN) {
    int64_t token = 0, d = element;
    if (p.T > 1) {  // the same branch for all threads
      const unsigned along = first_d + unsigned(element - begin);
      token = first_token + along / unsigned(p.D);
      d = along % unsigned(p.D);
    }
    // raw until x is there too: the two loads overlap
    const Pack<T, kN> raw = *reinterpret_cast<const Pack<T, kN>*>(
        x_pred_sample + token * p.x_pred_stride_t + d * p.x_pred_stride_d);
    float x_pred[kN], x[kN];
    load_as<kN, true>(p.x, p.x_dtype, b * p.x_stride_b + token * p.x_stride_t + d * p.x_stride_d,
                      kN, 0.0f, x);
#pragma unroll
    for (int i = 0; i < kN; ++i) x_pred[i] = to_float(raw.values[i]);
    fn(x_pred, x, element);
  }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    chunk_sums_kernel(const FlowMatchingLossParams p, int64_t chunks) {
  __shared__ float partials[2 * kThreads / kWarpSize];
  const int64_t b = blockIdx.x / chunks;
  float sum = 0.0f, unused = 0.0f;
  for_chunk<T, kN>(p, b, blockIdx.x % chunks * p.elements_per_chunk,
                   [&](const float (&x_pred)[kN], const float (&x)[kN], int64_t) {
#pragma unroll
                     for (int i = 0; i < kN; ++i) sum += (x_pred[i] - x[i]) * (x_pred[i] - x[i]);
                   });
  row_sum(sum, unused, partials);
  if (threadIdx.x == 0) static_cast<float*>(p.partials)[blockIdx.x] = sum;
}

// threadIdx.y is a sample.
__global__ void __launch_bounds__(kThreads)
    losses_kernel(const FlowMatchingLossParams p, int64_t chunks) {
  const int64_t b = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (b >= p.B) return;  // the same for all threads of a warp
  const float* partials = static_cast<const float*>(p.partials) + b * chunks;
  // fp64: a handful of numbers, and one rounding less for each
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kWarpSize) sum += partials[chunk];
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  }
  if (threadIdx.x == 0) {
    const double t = load_one(p.t, p.t_dtype, b * p.t_stride, 0.0f);
    static_cast<float*>(p.loss)[b] =
        float(sum / double(p.T * p.D) * math::velocity_weight(t, p.t_eps));
  }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    grad_x_pred_kernel(const FlowMatchingLossGradParams g, int64_t chunks) {
  const FlowMatchingLossParams& p = g.forward;
  const int64_t b = blockIdx.x / chunks;
  const double t = load_one(p.t, p.t_dtype, b * p.t_stride, 0.0f);
  const double grad_loss = load_one(g.grad_loss, g.grad_loss_dtype, b * g.grad_loss_stride, 0.0f);
  const float factor =
      float(grad_loss * math::velocity_weight(t, p.t_eps) * 2.0 / double(p.T * p.D));
  T* grad = static_cast<T*>(g.grad_x_pred) + b * p.T * p.D;
  for_chunk<T, kN>(p, b, blockIdx.x % chunks * p.elements_per_chunk,
                   [&](const float (&x_pred)[kN], const float (&x)[kN], int64_t element) {
                     float out[kN];
#pragma unroll
                     for (int i = 0; i < kN; ++i) out[i] = (x_pred[i] - x[i]) * factor;
                     store<kN, true>(out, grad + element, kN);
                   });
}

// Whether neighbours may be read as packs of kN: a pack lies within one token and one chunk.
template <int kN>
bool is_packed(const FlowMatchingLossParams& p) {
  return p.x_pred_stride_d == 1 && p.x_stride_d == 1 && p.D % kN == 0 &&
         p.elements_per_chunk % kN == 0 &&
         packs_are_aligned(p.x_pred, p.x_pred_dtype, kN, p.x_pred_stride_b, p.x_pred_stride_t) &&
         packs_are_aligned(p.x, p.x_dtype, kN, p.x_stride_b, p.x_stride_t);
}

template <typename T>
Status launch_fwd(const FlowMatchingLossParams& p, int64_t chunks, cudaStream_t stream) {
  constexpr int kN = 16 / sizeof(T);
  const Status status =
      launch(is_packed<kN>(p) ? chunk_sums_kernel<T, kN> : chunk_sums_kernel<T, 1>,
             unsigned(p.B * chunks), kThreads, stream, p, chunks);
  if (status != nullptr) return status;
  constexpr int kSamples = kThreads / kWarpSize;
  return launch(losses_kernel, unsigned(ceil_div(p.B, kSamples)), dim3(kWarpSize, kSamples), stream,
                p, chunks);
}

template <typename T>
Status launch_bwd(const FlowMatchingLossGradParams& g, int64_t chunks, cudaStream_t stream) {
  constexpr int kN = 16 / sizeof(T);
  const FlowMatchingLossParams& p = g.forward;
  const bool packed =
      is_packed<kN>(p) && packs_are_aligned(g.grad_x_pred, p.x_pred_dtype, kN, p.T * p.D, 0);
  return launch(packed ? grad_x_pred_kernel<T, kN> : grad_x_pred_kernel<T, 1>,
                unsigned(p.B * chunks), kThreads, stream, g, chunks);
}

// Chunks of one sample, or why there are none.
Status count_chunks(const FlowMatchingLossParams& p, int64_t* chunks) {
  if (p.x_pred_dtype == DType::kFloat64 || p.x_dtype == DType::kFloat64) {
    return "x_pred and x must be fp32, bf16 or fp16";
  }
  if (p.T > 1 && p.D > kMaxWidthOfToken) return "tokens of 2^31 elements must be dense";
  *chunks = ceil_div(p.T * p.D, p.elements_per_chunk);
  return p.B * *chunks > kMaxBlocks ? "more chunks of elements than a grid holds" : nullptr;
}

}  // namespace

Status flow_matching_loss_fwd(const FlowMatchingLossParams& p, void* stream) {
  if (p.B * p.T * p.D == 0) return nullptr;  // no blocks would be an error
  int64_t chunks = 0;
  const Status status = count_chunks(p, &chunks);
  if (status != nullptr) return status;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.x_pred_dtype) {
    case DType::kFloat32:
      return launch_fwd<float>(p, chunks, cuda_stream);
    case DType::kBFloat16:
      return launch_fwd<__nv_bfloat16>(p, chunks, cuda_stream);
    default:
      return launch_fwd<__half>(p, chunks, cuda_stream);
  }
}

Status flow_matching_loss_bwd(const FlowMatchingLossGradParams& g, void* stream) {
  const FlowMatchingLossParams& p = g.forward;
  if (p.B * p.T * p.D == 0) return nullptr;
  int64_t chunks = 0;
  const Status status = count_chunks(p, &chunks);
  if (status != nullptr) return status;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.x_pred_dtype) {
    case DType::kFloat32:
      return launch_bwd<float>(g, chunks, cuda_stream);
    case DType::kBFloat16:
      return launch_bwd<__nv_bfloat16>(g, chunks, cuda_stream);
    default:
      return launch_bwd<__half>(g, chunks, cuda_stream);
  }
}

}  // namespace pixelgen::cuda
