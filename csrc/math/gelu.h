// GELU with the normal distribution function itself (no tanh), and its derivative, for the CPU:
// branch-free in fp32, so that the compiler vectorises them for any instruction set.
//
//   gelu(x) = x Phi(x),   gelu'(x) = Phi(x) + x phi(x),   phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
//
// With z = |x|, both follow from the tail Phi(-z), which is exp(-z^2 / 2) times a smooth function,
// Mills' ratio over sqrt(2 pi). Its polynomial is a least-squares fit in float64 on [0, 6.5], with
// weights max(1, z) exp(-z^2 / 2) and those of Lawson's iteration, which make the largest error of
// both results smallest: 9e-9. Beyond 6.5 exp(-z^2 / 2) is below 7e-10 and shrinks faster than the
// polynomial grows. In all, errors are below 1e-7 where |x| < 2 and half a unit in the last place
// where gelu(x) is larger (tests/ops/test_pixel_mlp.py).
//
// NaN stays NaN, gelu(inf) is inf; gelu(-inf) is 0 but for 1e-30, as the limit.
#pragma once

#include "exp.h"

namespace pixelgen::math {

template <typename Real>
struct Gelu {
  Real value, slope;
};

PIXELGEN_INLINE Gelu<float> gelu_and_slope(float x) {
  const float z = float_of(bits_of(limit(x, 13.0f)) & 0x7fffffff);  // exp(-z^2 / 2) stays normal
  const float power = z * z * -0.721347520f;                        // base 2
  const float n_and_round = power + kRoundFloat;
  const float f = power - (n_and_round - kRoundFloat);
  float e = 1.534581189e-4f;  // 2^f for |f| <= 1/2, fitted in the same way: relative error 2e-9
  e = e * f + 1.339993139e-3f;
  e = e * f + 9.618488959e-3f;
  e = e * f + 5.550328777e-2f;
  e = e * f + 2.402264689e-1f;
  e = e * f + 6.931472057e-1f;
  e = (e * f + 1.0f) * power_of_two(n_and_round);
  float p = 4.499801395e-8f;
  p = p * z + -1.295938734e-6f;
  p = p * z + 1.688327499e-5f;
  p = p * z + -1.331715917e-4f;
  p = p * z + 7.225116241e-4f;
  p = p * z + -2.927886178e-3f;
  p = p * z + 9.473836326e-3f;
  p = p * z + -2.589415716e-2f;
  p = p * z + 6.216015244e-2f;
  p = p * z + -1.328824217e-1f;
  p = p * z + 2.499852259e-1f;
  p = p * z + -3.989414108e-1f;
  p = p * z + 4.999999915e-1f;
  const float tail = e * p;
  const float slope = e * (p - z * 0.398942280f);  // at -z
  return {(x > 0.0f ? x : 0.0f) - z * tail, x > 0.0f ? 1.0f - slope : slope};
}

PIXELGEN_INLINE Gelu<double> gelu_and_slope(double x) {
  const double z = limit(x, 50.0);  // x phi(x) of infinity is 0
  const double phi = 0.39894228040143267794 * exp(-0.5 * z * z);
  const double cdf = 0.5 * __builtin_erfc(-z * 0.70710678118654752440);
  return {x > 0.0 ? x * cdf : z * cdf, cdf + z * phi};
}

}  // namespace pixelgen::math
