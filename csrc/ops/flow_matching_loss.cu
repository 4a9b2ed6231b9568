// Bound by bytes: x_pred and x are read once (backward: and grad_x_pred written once). One block
// adds up one chunk of one sample; a second kernel, one warp per sample, adds the chunks' sums in a
// fixed order.
#include "../common/distances.cuh"
#include "../math/flow.h"
#include "flow_matching_loss.h"

namespace pixelgen::cuda {
namespace {

constexpr int64_t kLength = 4096;  // of a chunk: what fills an even share of the multiprocessors
constexpr int64_t kMaxWidthOfToken = 0x7fffffff;

// fn(x_pred, x, element) with kN neighbours at a time of the chunk of this block; `element` is
// their place in the sample.
template <typename T, int kN, typename Fn>
__device__ __forceinline__ void for_chunk(const FlowMatchingLoss& a, const Chunk& chunk, Fn fn) {
  const int64_t tokens = a.x_pred.size[1], D = a.x_pred.size[2];
  const T* x_pred_sample = a.x_pred.as<T>() + a.x_pred.offset(chunk.b);
  // one division of 64 bits per block; D fits 32 where there are several tokens
  const int64_t first_token = chunk.begin / D;
  const unsigned first_d = unsigned(chunk.begin - first_token * D);
  for (int64_t element = chunk.begin + threadIdx.x * kN; element < chunk.end;
       element += kThreads * kN) {
    int64_t token = 0, d = element;
    if (tokens > 1) {  // the same branch for all threads
      const unsigned along = first_d + unsigned(element - chunk.begin);
      token = first_token + along / unsigned(D);
      d = along % unsigned(D);
    }
    // raw until x is there too: the two loads overlap
    const Pack<T, kN> raw = *reinterpret_cast<const Pack<T, kN>*>(
        x_pred_sample + token * a.x_pred.stride[1] + d * a.x_pred.stride[2]);
    float x_pred[kN], x[kN];
    load_as<kN, true>(a.x.data, a.x.dtype, a.x.offset(chunk.b, token, d), kN, 0.0f, x);
#pragma unroll
    for (int i = 0; i < kN; ++i) x_pred[i] = to_float(raw.values[i]);
    fn(x_pred, x, element);
  }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    chunk_sums_kernel(const FlowMatchingLossFwd a, const Chunks chunks) {
  float sum = 0.0f;
  for_chunk<T, kN>(a, Chunk(chunks), [&](const float (&x_pred)[kN], const float (&x)[kN], int64_t) {
#pragma unroll
    for (int i = 0; i < kN; ++i) sum += (x_pred[i] - x[i]) * (x_pred[i] - x[i]);
  });
  store_partial(warp_sum(sum), chunks);
}

struct VelocityWeight {
  Tensor<1> t;
  double t_eps;

  __device__ __forceinline__ double operator()(int64_t b) const {
    return math::velocity_weight(double(number(t, b)), t_eps);
  }
};

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    grad_x_pred_kernel(const FlowMatchingLossBwd g, const Chunks chunks) {
  const Chunk chunk(chunks);
  const double grad_loss = number(g.grad_loss, chunk.b);
  const float factor =
      float(grad_loss * VelocityWeight{g.t, g.t_eps}(chunk.b) * 2.0 / double(chunks.size));
  T* grad = g.grad_x_pred.as<T>() + chunk.b * chunks.size;
  for_chunk<T, kN>(g, chunk, [&](const float (&x_pred)[kN], const float (&x)[kN], int64_t element) {
    float out[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) out[i] = (x_pred[i] - x[i]) * factor;
    store<kN, true>(out, grad + element, kN);
  });
}

// Whether neighbours may be read as packs of N, which lie within one token; kLength is a multiple.
bool is_packed(const FlowMatchingLoss& a, int N) {
  return has_packs(a.x_pred, N, 2, 0, 1) && has_packs(a.x, N, 2, 0, 1);
}

// Calls fn(arguments, T{}) with the tokens joined where they can be.
template <typename Arguments, typename Fn>
Status with_joined_tokens(Arguments a, Fn fn) {
  return checked(a, a.x_pred.dtype, [&](auto element) -> Status {
    a.join_tokens();
    if (a.x_pred.size[1] > 1 && a.x_pred.size[2] > kMaxWidthOfToken)
      return "tokens of 2^31 elements must be dense";
    return fn(a, element);
  });
}

}  // namespace

Status flow_matching_loss_fwd(const FlowMatchingLossFwd& given, const Place& place) {
  return with_joined_tokens(given, [&](const FlowMatchingLossFwd& a, auto element) {
    using T = decltype(element);
    constexpr int kN = 16 / sizeof(T);
    const auto kernel = is_packed(a, kN) ? chunk_sums_kernel<T, kN> : chunk_sums_kernel<T, 1>;
    const auto start = [&](const Chunks& chunks) {
      return launch(kernel, chunks.blocks, kThreads, place, a, chunks);
    };
    return chunk_means(a.loss, a.x_pred.size[0], a.size(), kLength, place, start,
                       VelocityWeight{a.t, a.t_eps});
  });
}

Status flow_matching_loss_bwd(const FlowMatchingLossBwd& given, const Place& place) {
  return with_joined_tokens(given, [&](const FlowMatchingLossBwd& g, auto element) {
    using T = decltype(element);
    constexpr int kN = 16 / sizeof(T);
    const bool packed =
        is_packed(g, kN) && packs_are_aligned(g.grad_x_pred.data, g.x_pred.dtype, kN, g.size(), 0);
    const auto kernel = packed ? grad_x_pred_kernel<T, kN> : grad_x_pred_kernel<T, 1>;
    return with_chunks(g.x_pred.size[0], g.size(), kLength, [&](const Chunks& chunks) {
      return launch(kernel, chunks.blocks, kThreads, place, g, chunks);
    });
  });
}

PIXELGEN_OPS(flow_matching_loss, PIXELGEN_OP(flow_matching_loss_fwd),
             PIXELGEN_OP(flow_matching_loss_bwd))

}  // namespace pixelgen::cuda
