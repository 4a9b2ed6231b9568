// loss_b = weight_b / (T D) * sum over tokens and channels of (x_pred - x)^2
// weight_b = 1 / max(1 - t_b, t_eps)^2
// grad_x_pred = grad_loss_b * weight_b * 2 / (T D) * (x_pred - x)
// Arithmetic in fp32 (fp64 when x_pred or x is fp64): the "stats dtype" below.
#pragma once

#include "common.h"

namespace pixelgen {

struct FlowMatchingLossParams {
  const void *x_pred, *x;  // (B, T, D), strides below
  const void* t;           // (B,)
  void* loss;              // (B,) stats dtype; unused in backward
  // A sample's elements, in the order (token, channel), are added up in chunks and the chunks' sums
  // in a second pass, so the bits depend on elements_per_chunk alone.
  void* partials;  // (B, ceil(T D / elements_per_chunk)) stats dtype; unused in backward
  int64_t elements_per_chunk;
  int64_t B, T, D;
  int64_t x_pred_stride_b, x_pred_stride_t, x_pred_stride_d;
  int64_t x_stride_b, x_stride_t, x_stride_d;
  int64_t t_stride;
  double t_eps;
  DType x_pred_dtype, x_dtype, t_dtype;
};

struct FlowMatchingLossGradParams {
  FlowMatchingLossParams forward;
  const void* grad_loss;  // (B,), any dtype
  int64_t grad_loss_stride;
  DType grad_loss_dtype;
  void* grad_x_pred;  // as x_pred, dense
};

namespace cpu {
Status flow_matching_loss_fwd(const FlowMatchingLossParams& p, int num_threads);
Status flow_matching_loss_bwd(const FlowMatchingLossGradParams& g, int num_threads);
}  // namespace cpu

// Enqueue on `stream`. Never allocate, never synchronise. x_pred and x are not fp64.
namespace cuda {
Status flow_matching_loss_fwd(const FlowMatchingLossParams& p, void* stream);
Status flow_matching_loss_bwd(const FlowMatchingLossGradParams& g, void* stream);
}  // namespace cuda

}  // namespace pixelgen
