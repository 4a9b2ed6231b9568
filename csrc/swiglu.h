// y = a * sigmoid(a) * b, where a and b are the halves of a row of x. Arithmetic in fp32 (fp64 for
// fp64 x).
#pragma once

#include "common.h"

namespace pixelgen {

struct SwigluParams {
  const void* x;  // (num_outer, num_inner, 2 F), strides below
  void* y;        // (num_outer, num_inner, F), dense; unused in backward
  int64_t num_outer, num_inner, F;
  int64_t x_outer_stride, x_inner_stride;
  DType dtype;  // of every buffer
};

struct SwigluGradParams {
  SwigluParams forward;
  const void* grad_y;  // as y, strides below
  int64_t grad_y_outer_stride, grad_y_inner_stride;
  void* grad_x;  // as x, dense
};

// There is no cuda:: here: on CUDA the op is a Triton kernel.
namespace cpu {
Status swiglu_fwd(const SwigluParams& p, int num_threads);
Status swiglu_bwd(const SwigluGradParams& p, int num_threads);
}  // namespace cpu

}  // namespace pixelgen
