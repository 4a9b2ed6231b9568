// Bound by bytes: pred and target are read once (backward: and each wanted gradient written once).
// One warp per token; a block has a chunk of one sample's tokens.
#include "../common/distances.cuh"
#include "../math/distance.h"
#include "cosine_distance.h"

namespace pixelgen::cuda {
namespace {

constexpr int64_t kLength = kWarps;  // tokens of a chunk: one per warp

// fn(pred, target, d) with kN neighbours at a time of the elements of a token that are this
// thread's.
template <typename T, int kN, typename Fn>
__device__ __forceinline__ void for_token(const CosineDistance& a, int64_t b, int64_t token,
                                          Fn fn) {
  const T* pred = a.pred.as<T>() + a.pred.offset(b, token);
  const int64_t target = a.target.offset(b, token);
#pragma unroll 2
  for (int64_t d = threadIdx.x * kN; d < a.pred.size[2]; d += kWarpSize * kN) {
    // raw until target is there too: the two loads overlap
    const Pack<T, kN> raw = *reinterpret_cast<const Pack<T, kN>*>(pred + d * a.pred.stride[2]);
    float u[kN], v[kN];
    load_as<kN, true>(a.target.data, a.target.dtype, target + d * a.target.stride[2], kN, 0.0f, v);
#pragma unroll
    for (int i = 0; i < kN; ++i) u[i] = to_float(raw.values[i]);
    fn(u, v, d);
  }
}

// threadIdx.y is a token.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 2)
    chunk_sums_kernel(const CosineDistanceFwd a, const Chunks chunks) {
  const Chunk chunk(chunks);
  float* statistics = a.statistics.as<float>() + 3 * chunks.size * chunk.b;
  double distance = 0.0;
  for (int64_t token = chunk.begin + threadIdx.y; token < chunk.end; token += kWarps) {
    float pred_square = 0.0f, target_square = 0.0f, product = 0.0f;
    for_token<T, kN>(a, chunk.b, token, [&](const float (&u)[kN], const float (&v)[kN], int64_t) {
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
      const double eps = a.eps;
      cosine /= (pred_norm < eps ? eps : double(pred_norm)) *
                (target_norm < eps ? eps : double(target_norm));
    }
    distance += 1.0 - cosine;
    if (threadIdx.x == 0) {
      statistics[token] = pred_norm;
      statistics[chunks.size + token] = target_norm;
      statistics[2 * chunks.size + token] = float(cosine);
    }
  }
  store_partial(distance, chunks);
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 2)
    grads_kernel(const CosineDistanceBwd g, const Chunks chunks) {
  const Chunk chunk(chunks);
  const float* statistics = g.statistics.as<float>() + 3 * chunks.size * chunk.b;
  const double grad = number(g.grad_distance, chunk.b);
  const float factor = float(grad / double(chunks.size)), eps = float(g.eps);
  for (int64_t token = chunk.begin + threadIdx.y; token < chunk.end; token += kWarps) {
    const float pred_norm = statistics[token], target_norm = statistics[chunks.size + token];
    const float cosine = statistics[2 * chunks.size + token];
    const auto of_pred = math::cosine_factors(pred_norm, target_norm, cosine, eps, factor);
    const auto of_target = math::cosine_factors(target_norm, pred_norm, cosine, eps, factor);
    const int64_t row = (chunk.b * chunks.size + token) * g.pred.size[2];
    for_token<T, kN>(g, chunk.b, token, [&](const float (&u)[kN], const float (&v)[kN], int64_t d) {
      float out[kN];
      if (g.grad_pred.data != nullptr) {
#pragma unroll
        for (int i = 0; i < kN; ++i) out[i] = math::cosine_grad(u[i], v[i], of_pred);
        store<kN, true>(out, g.grad_pred.as<T>() + row + d, kN);
      }
      if (g.grad_target.data != nullptr) {
#pragma unroll
        for (int i = 0; i < kN; ++i) out[i] = math::cosine_grad(v[i], u[i], of_target);
        store_as<kN, true>(out, g.grad_target.data, g.target.dtype, row + d, kN);
      }
    });
  }
}

// Whether neighbours may be read as packs of N.
bool is_packed(const CosineDistance& a, int N) {
  return has_packs(a.pred, N, 2, 0, 1) && has_packs(a.target, N, 2, 0, 1);
}

}  // namespace

Status cosine_distance_fwd(const CosineDistanceFwd& a, const Place& place) {
  return checked(a, a.pred.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kN = 16 / sizeof(T);
    const auto kernel = is_packed(a, kN) ? chunk_sums_kernel<T, kN> : chunk_sums_kernel<T, 1>;
    return chunk_means(
        a.distance, a.pred.size[0], a.pred.size[1], kLength, place, [&](const Chunks& chunks) {
          return launch(kernel, chunks.blocks, dim3(kWarpSize, kWarps), place, a, chunks);
        });
  });
}

Status cosine_distance_bwd(const CosineDistanceBwd& g, const Place& place) {
  return checked(g, g.pred.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kN = 16 / sizeof(T);
    const int64_t D = g.pred.size[2];
    const bool packed = is_packed(g, kN) &&
                        packs_are_aligned(g.grad_pred.data, g.pred.dtype, kN, D, 0) &&
                        packs_are_aligned(g.grad_target.data, g.target.dtype, kN, D, 0);
    const auto kernel = packed ? grads_kernel<T, kN> : grads_kernel<T, 1>;
    return with_chunks(g.pred.size[0], g.pred.size[1], kLength, [&](const Chunks& chunks) {
      return launch(kernel, chunks.blocks, dim3(kWarpSize, kWarps), place, g, chunks);
    });
  });
}

PIXELGEN_OPS(cosine_distance, PIXELGEN_OP(cosine_distance_fwd), PIXELGEN_OP(cosine_distance_bwd))

}  // namespace pixelgen::cuda
