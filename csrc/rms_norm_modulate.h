// n = (x - mean) * rstd                       mean = 0 for the rms norm
// y = (n * weight + bias) * (1 + scale) + shift
// Statistics and arithmetic in fp32 (fp64 for fp64 x): the "stats dtype" below.
#pragma once

#include "common.h"

namespace pixelgen {

// x is seen as num_images groups of rows_per_image rows; without shift and scale one group may hold
// all rows.
struct RmsNormModulateParams {
  const void* x;              // (num_images, rows_per_image, C), strides below
  const void *shift, *scale;  // (num_images, C), or (num_images, rows_per_image, C), or null
  const void *weight, *bias;  // (C,), dense, or null
  void* y;                    // as x, dense; unused in backward
  void *mean, *rstd;          // (num_images * rows_per_image,) stats dtype; mean null for rms
  int64_t num_images, rows_per_image, C;
  int64_t x_image_stride, x_row_stride;
  int64_t shift_image_stride, shift_row_stride;  // row strides count only when per_token
  int64_t scale_image_stride, scale_row_stride;
  DType x_dtype, modulation_dtype,
      weight_dtype;  // of x and y; of shift and scale; of weight and bias
  bool per_token;    // shift and scale differ from row to row of one image
  bool layer_norm;
  double eps;
};

struct RmsNormModulateGradParams {
  RmsNormModulateParams forward;  // mean and rstd are read
  const void* grad_y;             // as x, in its dtype, strides below
  int64_t grad_y_image_stride, grad_y_row_stride;
  void* grad_x;                   // as x, dense
  void *grad_shift, *grad_scale;  // shape and dtype of shift and scale, dense, or null
  void *grad_weight, *grad_bias;  // (C,) in the dtype of weight, or null
  // Gradients that sum over rows go through one partial sum per chunk of rows and a second pass, so
  // their bits depend on rows_per_chunk alone and not on how many threads or blocks run.
  void*
      partials;  // (num_images * ceil(rows_per_image / rows_per_chunk), 2, C) stats dtype, or null
  int64_t rows_per_chunk;
};

namespace cpu {
Status rms_norm_modulate_fwd(const RmsNormModulateParams& p, int num_threads);
Status rms_norm_modulate_bwd(const RmsNormModulateGradParams& p, int num_threads);
}  // namespace cpu

// Enqueue on `stream`. Never allocate, never synchronise. x is not fp64.
namespace cuda {
Status rms_norm_modulate_fwd(const RmsNormModulateParams& p, void* stream);
Status rms_norm_modulate_bwd(const RmsNormModulateGradParams& p, void* stream);
}  // namespace cuda

}  // namespace pixelgen
