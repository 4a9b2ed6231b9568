// d_b = 1 / (H W) * sum over positions and channels of weight_c (u_c - v_c)^2
// u = pred / (|pred| + eps), v = target / (|target| + eps), the norms over channels; 0 where the
// norm is 0
// grad_pred_c = 2 grad_d_b / (H W) / (|pred| + eps) * (weight_c (u_c - v_c) - pred_c radial)
// radial = sum_c weight_c (u_c - v_c) u_c / |pred|
// Arithmetic in fp32 (fp64 when pred or target is fp64): the "stats dtype" below.
#pragma once

#include "common.h"

namespace pixelgen {

struct LpipsDistanceParams {
  const void *pred, *target;  // (B, C, H, W), strides below
  const void* weight;         // (C,)
  void* distance;             // (B,) stats dtype; unused in backward
  // (B, 3, H W) stats dtype, kept for backward: |pred| + eps and |target| + eps, 0 where the norm
  // is 0; radial
  void* statistics;
  // A sample's positions are added up in chunks and the chunks' sums in a second pass, so the bits
  // depend on positions_per_chunk alone.
  void* partials;  // (B, ceil(H W / positions_per_chunk)) stats dtype; unused in backward
  int64_t positions_per_chunk;
  int64_t B, C, H, W;
  int64_t pred_stride_b, pred_stride_c, pred_stride_h, pred_stride_w;
  int64_t target_stride_b, target_stride_c, target_stride_h, target_stride_w;
  int64_t weight_stride;
  double eps;
  DType pred_dtype, target_dtype, weight_dtype;
};

struct LpipsDistanceGradParams {
  LpipsDistanceParams forward;
  const void* grad_distance;  // (B,), any dtype
  int64_t grad_distance_stride;
  DType grad_distance_dtype;
  void* grad_pred;  // as pred, strides below
  int64_t grad_pred_stride_b, grad_pred_stride_c, grad_pred_stride_h, grad_pred_stride_w;
};

namespace cpu {
Status lpips_distance_fwd(const LpipsDistanceParams& p, int num_threads);
Status lpips_distance_bwd(const LpipsDistanceGradParams& g, int num_threads);
}  // namespace cpu

// Enqueue on `stream`. Never allocate, never synchronise. pred and target are not fp64.
namespace cuda {
Status lpips_distance_fwd(const LpipsDistanceParams& p, void* stream);
Status lpips_distance_bwd(const LpipsDistanceGradParams& g, void* stream);
}  // namespace cuda

}  // namespace pixelgen
