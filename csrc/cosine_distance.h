// d_b = 1 / T * sum over tokens of 1 - cosine
// cosine = <u, v>, u = pred / max(|pred|, eps), v = target / max(|target|, eps); 0 where a vector
// is zero
// grad_pred = grad_d_b / T / max(|pred|, eps) * (u cosine - v), the first term absent where
// |pred| < eps, all of it where pred is zero; grad_target likewise
// Arithmetic in fp32 (fp64 when pred or target is fp64): the "stats dtype" below.
#pragma once

#include "common.h"

namespace pixelgen {

struct CosineDistanceParams {
  const void *pred, *target;  // (B, T, D), strides below
  void* distance;             // (B,) stats dtype; unused in backward
  void* statistics;           // (B, 3, T) stats dtype, kept for backward: |pred|, |target|, cosine
  // A sample's tokens are added up in chunks and the chunks' sums in a second pass, so the bits
  // depend on tokens_per_chunk alone.
  void* partials;  // (B, ceil(T / tokens_per_chunk)) stats dtype; unused in backward
  int64_t tokens_per_chunk;
  int64_t B, T, D;
  int64_t pred_stride_b, pred_stride_t, pred_stride_d;
  int64_t target_stride_b, target_stride_t, target_stride_d;
  double eps;
  DType pred_dtype, target_dtype;
};

struct CosineDistanceGradParams {
  CosineDistanceParams forward;
  const void* grad_distance;  // (B,), any dtype
  int64_t grad_distance_stride;
  DType grad_distance_dtype;
  void *grad_pred, *grad_target;  // as pred and target, dense; null where not wanted
};

namespace cpu {
Status cosine_distance_fwd(const CosineDistanceParams& p, int num_threads);
Status cosine_distance_bwd(const CosineDistanceGradParams& g, int num_threads);
}  // namespace cpu

// Enqueue on `stream`. Never allocate, never synchronise. pred and target are not fp64.
namespace cuda {
Status cosine_distance_fwd(const CosineDistanceParams& p, void* stream);
Status cosine_distance_bwd(const CosineDistanceGradParams& g, void* stream);
}  // namespace cuda

}  // namespace pixelgen
