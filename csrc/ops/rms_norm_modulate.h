// y = (n * weight + bias) * (1 + scale) + shift, n the rms or layer norm of x: common/norm.h.
#pragma once

#include "../common/norm.h"

namespace pixelgen {

struct RmsNormModulateFwd : NormArguments {
  Rows<> x;  // (B, T, C)
  Dense y;   // as x
  double eps;
  PIXELGEN_ARGUMENTS(x, shift, scale, weight, bias, y, mean, rstd, norm, eps)
};

struct RmsNormModulateBwd : NormArguments, NormGrads {
  Rows<Need::kOptional> grad_y;  // as x; None is zeros
  Rows<> x;
  PIXELGEN_ARGUMENTS(grad_y, x, shift, scale, weight, bias, mean, rstd, grad_x, grad_shift,
                     grad_scale, grad_weight, grad_bias, norm)
};

namespace {

inline Status make_norm(const RmsNormModulateFwd& a, NormFwd* p) {
  *p = {{a, a.x}, a.y, a.eps};
  const Status status = check_norm_fwd(*p);
  join_images(*p, &p->x);
  return status;
}

inline Status make_norm(const RmsNormModulateBwd& a, const ChunkRule& rule, const Place& place,
                        NormBwd* p) {
  *p = {{a, a.x}, a, a.grad_y};
  const Status status = check_norm_bwd(*p);
  if (status != nullptr) return status;
  join_images(*p, &p->x, &p->grad_y);
  return make_chunks(rule, element_size(a.x.dtype), false, place, p);
}

}  // namespace
}  // namespace pixelgen
