// residual = x + gate * y, rounded to the dtype of x
// normed = (n * weight + bias) * (1 + scale) + shift, n the norm of residual: rms_norm_modulate.h
#pragma once

#include "common.h"
#include "rms_norm_modulate.h"

namespace pixelgen {

struct GatedBranch {
  const void* y;     // (num_images, rows_per_image, C), strides below
  const void* gate;  // (num_images, C), or (num_images, rows_per_image, C)
  int64_t y_image_stride, y_row_stride;
  int64_t gate_image_stride, gate_row_stride;  // the row stride counts only when gate_per_token
  DType y_dtype, gate_dtype;
  bool gate_per_token;
};

struct GateResidualNormModulateParams {
  RmsNormModulateParams norm;  // its x is x, its y is normed
  GatedBranch branch;
  void* residual;  // as x, dense
};

struct GateResidualNormModulateGradParams {
  // Its x is the residual, its grad_y that of normed, its grad_x that of x.
  RmsNormModulateGradParams norm;
  GatedBranch branch;
  const void* grad_residual;  // as x, in its dtype, strides below
  int64_t grad_residual_image_stride, grad_residual_row_stride;
  void* grad_y;         // shape and dtype of y, dense
  void* grad_gate;      // shape and dtype of gate, dense
  void* gate_partials;  // (chunks of norm.partials, C) stats dtype, or null when gate_per_token
};

namespace cpu {
Status gate_residual_norm_modulate_fwd(const GateResidualNormModulateParams& p, int num_threads);
Status gate_residual_norm_modulate_bwd(const GateResidualNormModulateGradParams& p,
                                       int num_threads);
}  // namespace cpu

// Enqueue on `stream`. Never allocate, never synchronise. x is not fp64.
namespace cuda {
Status gate_residual_norm_modulate_fwd(const GateResidualNormModulateParams& p, void* stream);
Status gate_residual_norm_modulate_bwd(const GateResidualNormModulateGradParams& p, void* stream);
}  // namespace cuda

}  // namespace pixelgen
