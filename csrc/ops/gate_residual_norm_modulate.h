// residual = x + gate * y, rounded to the dtype of x
// normed = (n * weight + bias) * (1 + scale) + shift, n the norm of residual: common/norm.h
#pragma once

#include "../common/norm.h"

namespace pixelgen {

struct GatedBranch {
  Rows<> y;          // (B, T, C)
  PerSample<> gate;  // (B, C) or (B, T, C)
};

struct GateResidualNormModulateFwd : NormArguments, GatedBranch {
  Rows<> x;                // (B, T, C)
  Dense residual, normed;  // as x
  double eps;
  PIXELGEN_ARGUMENTS(x, y, gate, shift, scale, weight, bias, residual, normed, mean, rstd, norm,
                     eps)
};

struct GateResidualNormModulateBwd : NormArguments, NormGrads, GatedBranch {
  Rows<Need::kOptional> grad_residual, grad_normed;  // as residual; None is zeros
  Rows<> residual;                                   // (B, T, C)
  Dense grad_y, grad_gate;                           // as y and gate
  PIXELGEN_ARGUMENTS(grad_residual, grad_normed, y, gate, shift, scale, weight, bias, residual,
                     mean, rstd, grad_x, grad_y, grad_gate, grad_shift, grad_scale, grad_weight,
                     grad_bias, norm)
};

namespace {

// Whether y and gate are of the rows of x.
inline bool is_branch_of(const View<3>& x, const GatedBranch& b) {
  return b.y.fits(x.size[0], x.size[1], x.size[2]) &&
         b.gate.fits(x.size[0], b.gate.per_row ? x.size[1] : 1, x.size[2]);
}

inline Status make_norm(const GateResidualNormModulateFwd& a, NormFwd* p) {
  *p = {{a, a.x}, a.normed, a.eps};
  const Status status = check_norm_fwd(*p);
  if (status != nullptr) return status;
  if (!a.residual.holds(a.normed.numel, a.x.dtype)) return "residual must be as x";
  return is_branch_of(a.x, a) ? nullptr : "y and gate must be of the rows of x";
}

inline Status make_norm(const GateResidualNormModulateBwd& a, const ChunkRule& rule,
                        const Place& place, NormBwd* p) {
  *p = {{a, a.residual}, a, a.grad_normed};
  const Status status = check_norm_bwd(*p);
  if (status != nullptr) return status;
  if (!is_branch_of(a.residual, a)) return "y and gate must be of the rows of residual";
  if (!is_upstream_of(a.residual, a.grad_residual)) return "grad_residual must be as residual";
  if (!is_grad_of(a.y, a.grad_y) || !is_grad_of(a.gate, a.grad_gate))
    return "grad_y and grad_gate must be as y and gate";
  const int64_t grad_bytes = element_size(a.residual.dtype) + element_size(a.y.dtype);
  return make_chunks(rule, grad_bytes, !a.gate.per_row, place, p);
}

}  // namespace
}  // namespace pixelgen
