// Formulas of the norms and of AdaLN's shift, scale and gate, forward and backward. Real is float
// or double.
#pragma once

#include "host_device.h"

namespace pixelgen::math {

// y = n * factor + offset
template <typename Real>
struct Affine {
  Real factor, offset;
};

// (n * weight + bias) * (1 + scale) + shift as one multiply and one add.
template <typename Real>
PIXELGEN_INLINE Affine<Real> fold_modulation(Real weight, Real bias, Real scale, Real shift) {
  const Real gain = Real(1) + scale;
  return {weight * gain, bias * gain + shift};
}

template <typename Real>
PIXELGEN_INLINE Real normalise(Real x, Real mean, Real rstd) {
  return (x - mean) * rstd;
}

template <typename Real>
PIXELGEN_INLINE Real modulate(Real n, Affine<Real> affine) {
  return n * affine.factor + affine.offset;
}

// grad_n = grad_y * factor; the means run over the row; mean_grad_n is 0 for the rms norm.
template <typename Real>
PIXELGEN_INLINE Real norm_grad_x(Real grad_n, Real n, Real rstd, Real mean_grad_n,
                                 Real mean_grad_n_n) {
  return rstd * (grad_n - mean_grad_n - n * mean_grad_n_n);
}

// Of scale, from the sums over rows of grad_y and of grad_y * n.
template <typename Real>
PIXELGEN_INLINE Real modulation_grad_scale(Real sum_grad, Real sum_grad_n, Real weight, Real bias) {
  return weight * sum_grad_n + bias * sum_grad;
}

template <typename Real>
PIXELGEN_INLINE Real add_gated(Real x, Real gate, Real y) {
  return x + gate * y;
}

template <typename Real>
struct BranchGrads {
  Real y, gate;
};

// Of y and gate, from that of the sum; that of x is the sum's own.
template <typename Real>
PIXELGEN_INLINE BranchGrads<Real> branch_grads(Real gate, Real y, Real grad) {
  return {gate * grad, y * grad};
}

}  // namespace pixelgen::math
