// Formulas of flow matching in x-prediction: t = 1 is data, t = 0 is noise. Real is float or
// double.
#pragma once

#include "fma.h"
#include "host_device.h"

namespace pixelgen::math {

// value / 127.5 - 1 of a uint8 value.
PIXELGEN_INLINE double pixel(double value) { return value / 127.5 - 1.0; }
PIXELGEN_INLINE float pixel(float value) {
#if PIXELGEN_HAS_FMA  // without the division, but for all 256 values the same bits
  constexpr float kInverse = 1.0f / 127.5f;
  const float quotient = value * kInverse;
  return multiply_add(multiply_add(-127.5f, quotient, value), kInverse, quotient) - 1.0f;
#else
  return value / 127.5f - 1.0f;
#endif
}

template <typename Real>
PIXELGEN_INLINE Real interpolate(Real x, Real noise, Real t) {
  return t * x + (Real(1) - t) * noise;
}

// 1 / max(1 - t, t_eps)^2: from the squared error of x to that of the velocity. NaN stays NaN.
template <typename Real>
PIXELGEN_INLINE Real velocity_weight(Real t, Real t_eps) {
  const Real to_data = Real(1) - t;
  const Real denominator = to_data < t_eps ? t_eps : to_data;
  return Real(1) / (denominator * denominator);
}

}  // namespace pixelgen::math
