// loss_b = weight_b / (T D) * sum over tokens and channels of (x_pred - x)^2
// weight_b = 1 / max(1 - t_b, t_eps)^2
// grad_x_pred = grad_loss_b * weight_b * 2 / (T D) * (x_pred - x)
// Arithmetic in fp32 (fp64 when x_pred or x is fp64): the "stats dtype" below.
#pragma once

#include "../common/distances.h"
#include "../common/op.h"

namespace pixelgen {

struct FlowMatchingLoss {
  Tensor<3> x_pred, x;  // (B, T, D)
  Tensor<1> t;          // (B,)
  double t_eps;

  PIXELGEN_MEMBER DType stats() const { return stats_dtype(x_pred.dtype, x.dtype); }
  PIXELGEN_MEMBER int64_t size() const { return x_pred.size[1] * x_pred.size[2]; }  // of a sample
  PIXELGEN_MEMBER Status check_inputs() const {
    const auto [B, T, D] = x_pred.size;
    if (!x.fits(B, T, D)) return "x must have the shape of x_pred";
    return t.fits(B) ? nullptr : "t must have one number per sample";
  }
  // Tokens that are evenly spaced in both tensors become one long token.
  PIXELGEN_MEMBER void join_tokens() { join<1>(x_pred, x); }
};

struct FlowMatchingLossFwd : FlowMatchingLoss {
  Dense loss;  // (B,) stats dtype
  PIXELGEN_ARGUMENTS(x_pred, x, t, loss, t_eps)

  PIXELGEN_MEMBER Status check() const {
    if (!loss.holds(x_pred.size[0], stats())) return "loss must have one number per sample";
    return check_inputs();
  }
};

struct FlowMatchingLossBwd : FlowMatchingLoss {
  Tensor<1> grad_loss;  // (B,)
  Dense grad_x_pred;    // as x_pred
  PIXELGEN_ARGUMENTS(grad_loss, x_pred, x, t, grad_x_pred, t_eps)

  PIXELGEN_MEMBER Status check() const {
    const int64_t B = x_pred.size[0];
    if (!grad_loss.fits(B)) return "grad_loss must have one number per sample";
    if (!grad_x_pred.holds(B * size(), x_pred.dtype)) return "grad_x_pred must be as x_pred";
    return check_inputs();
  }
};

}  // namespace pixelgen
