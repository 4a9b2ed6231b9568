// Formulas of the distances between feature vectors. Real is float or double.
#pragma once

#include "fma.h"
#include "host_device.h"

namespace pixelgen::math {

// What a vector is divided by. Where the inverse is 0, because the vector is zero or its norm
// infinite, so is the quotient.
template <typename Real>
struct Divisor {
  Real value, inverse;
};

// Divisor of a vector of this norm, 0 for a zero vector.
template <typename Real>
PIXELGEN_INLINE Divisor<Real> divisor(Real norm) {
  const Real inverse = norm == Real(0) ? Real(0) : Real(1) / norm;
  return {inverse == Real(0) ? Real(0) : norm, inverse};
}

// value / divisor, rounded as a division is.
PIXELGEN_INLINE double quotient(double value, Divisor<double> divisor) {
  return divisor.inverse == 0.0 ? value * 0.0 : value / divisor.value;
}
PIXELGEN_INLINE float quotient(float value, Divisor<float> divisor) {
#if PIXELGEN_HAS_FMA  // without the division
  const float q = value * divisor.inverse;
  return multiply_add(multiply_add(-q, divisor.value, value), divisor.inverse, q);
#else
  return divisor.inverse == 0.0f ? value * 0.0f : value / divisor.value;
#endif
}

// d/dp of factor * sum_c weight_c (u_c - v_c)^2 / 2, u = p / (|p| + eps), for one channel;
// `radial` is sum_c weight_c (u_c - v_c) u_c / |p|.
template <typename Real>
PIXELGEN_INLINE Real unit_distance_grad(Real p, Real q, Real weight, Divisor<Real> p_divisor,
                                        Divisor<Real> q_divisor, Real radial, Real factor) {
  const Real difference = quotient(p, p_divisor) - quotient(q, q_divisor);
  return (weight * difference - p * radial) * (factor * p_divisor.inverse);
}

// What is the same for all channels in d/dp of -factor * <u, v>, u = p / max(|p|, eps).
template <typename Real>
struct CosineFactors {
  Divisor<Real> p, q;
  Real along;  // <u, v>; 0 where the norm of p is below eps and so a constant
  Real factor;
};

// From the norms of p and q and their cosine <u, v>.
template <typename Real>
PIXELGEN_INLINE CosineFactors<Real> cosine_factors(Real p_norm, Real q_norm, Real cosine, Real eps,
                                                   Real factor) {
  // a norm of 0 stays: a zero vector has no direction
  const Divisor<Real> p = divisor(p_norm > Real(0) && p_norm < eps ? eps : p_norm);
  const Divisor<Real> q = divisor(q_norm > Real(0) && q_norm < eps ? eps : q_norm);
  return {p, q, p_norm < eps ? Real(0) : cosine, factor * p.inverse};
}

// Of one channel.
template <typename Real>
PIXELGEN_INLINE Real cosine_grad(Real p, Real q, CosineFactors<Real> factors) {
  return (quotient(p, factors.p) * factors.along - quotient(q, factors.q)) * factors.factor;
}

}  // namespace pixelgen::math
