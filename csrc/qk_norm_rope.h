// q = rotate(rms_norm(q) * q_weight), k = rotate(rms_norm(k) * k_weight), v = v, from a packed
// projection to the layout of attention. Arithmetic in fp32 (fp64 for fp64 qkv): the "stats dtype"
// below.
#pragma once

#include "common.h"

namespace pixelgen {

constexpr int64_t kMaxHeadDim = 256;

struct QkNormRopeParams {
  const void* qkv;                  // (B, T, 3, N, D), the last three dense, strides below
  const void *q_weight, *k_weight;  // (D,), dense
  const void *cos, *sin;  // (T - num_prefix_tokens, D / 2), dense, or null for no rotation
  void *q, *k, *v;        // (B, N, T, D), dense; unused in backward
  int64_t B, T, N, D;
  int64_t qkv_batch_stride, qkv_token_stride;
  int64_t num_prefix_tokens;  // at the front, not rotated
  DType qkv_dtype;            // of q, k and v too
  DType q_weight_dtype, k_weight_dtype, cos_dtype, sin_dtype;
  double eps;
};

// Of a (B, N, T, D) buffer whose last dimension is contiguous.
struct HeadsStrides {
  int64_t batch, head, token;
};

struct QkNormRopeGradParams {
  QkNormRopeParams forward;
  const void *grad_q, *grad_k, *grad_v;  // as q, in the dtype of qkv, strides below
  HeadsStrides grad_q_strides, grad_k_strides, grad_v_strides;
  void* grad_qkv;                       // as qkv, dense
  void *grad_q_weight, *grad_k_weight;  // (D,) in the dtypes of the weights
  // The weights' gradients go through one partial sum per chunk of the B * T tokens and a second
  // pass, so their bits depend on tokens_per_chunk alone and not on how many threads run.
  void* partials;  // (ceil(B * T / tokens_per_chunk), 2, D) stats dtype
  int64_t tokens_per_chunk;
};

// There is no cuda:: here: on CUDA the op is a Triton kernel.
namespace cpu {
Status qk_norm_rope_fwd(const QkNormRopeParams& p, int num_threads);
Status qk_norm_rope_bwd(const QkNormRopeGradParams& p, int num_threads);
}  // namespace cpu

}  // namespace pixelgen
