// exp and sigmoid for the CPU: branch-free, so that the compiler vectorises them for any
// instruction set. exp is within 1 ulp, subnormals included; exp(-inf) is 0, exp(inf) is inf, NaN
// stays NaN.
//
// x = n ln 2 + r with n an integer and |r| <= ln 2 / 2; exp(x) = 2^n exp(r), exp(r) by a
// polynomial.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"
#include "host_device.h"

#ifdef __ASSOCIATIVE_MATH__
#error "reordered sums undo the range reduction of exp; compile with -fno-associative-math"
#endif

namespace pixelgen::math {

PIXELGEN_INLINE uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

PIXELGEN_INLINE double double_of(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// 1.5 * 2^23 (2^52): a number that it is added to is rounded to an integer, in the low bits of the
// sum.
constexpr float kRoundFloat = 12582912.0f;
constexpr double kRoundDouble = 6755399441055744.0;

// 2^n of n + kRound.
PIXELGEN_INLINE float power_of_two(float n_and_round) {
  return float_of((bits_of(n_and_round) << 23) + (uint32_t(127) << 23));
}
PIXELGEN_INLINE double power_of_two(double n_and_round) {
  return double_of((bits_of(n_and_round) << 52) + (uint64_t(1023) << 52));
}

// x within [-limit, limit]; NaN stays NaN. In integers: where floats are compared, the compiler
// moves the rest of the formula into the branch of the constant, and there takes x * 0 for 0.
PIXELGEN_INLINE float limit(float x, float limit) {
  const int32_t magnitude = int32_t(bits_of(x) & 0x7fffffff), bound = int32_t(bits_of(limit));
  const int32_t limited = magnitude < bound ? magnitude : bound;
  const int32_t kept = magnitude > 0x7f800000 ? magnitude : limited;
  return float_of(uint32_t(kept) | (bits_of(x) & 0x80000000));
}
PIXELGEN_INLINE double limit(double x, double limit) {
  const int64_t magnitude = int64_t(bits_of(x) & 0x7fffffffffffffff),
                bound = int64_t(bits_of(limit));
  const int64_t limited = magnitude < bound ? magnitude : bound;
  const int64_t kept = magnitude > 0x7ff0000000000000 ? magnitude : limited;
  return double_of(uint64_t(kept) | (bits_of(x) & 0x8000000000000000));
}

PIXELGEN_INLINE float exp(float x) {
  x = limit(x, 104.0f);  // exp(-104) rounds to 0, exp(104) to infinity
  const float n = (x * 1.44269504f + kRoundFloat) - kRoundFloat;
  // ln 2 in two parts, n times the first is exact
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;  // coefficients of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors: it may be infinite or subnormal where the result is not
  const float half = n * 0.5f + kRoundFloat;
  const float rest = (n - (half - kRoundFloat)) + kRoundFloat;
  return p * power_of_two(half) * power_of_two(rest);
}

PIXELGEN_INLINE double exp(double x) {
  x = limit(x, 746.0);
  const double n = (x * 1.4426950408889634 + kRoundDouble) - kRoundDouble;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;  // Taylor: the first term left out is below 2^-57
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const double half = n * 0.5 + kRoundDouble;
  const double rest = (n - (half - kRoundDouble)) + kRoundDouble;
  return p * power_of_two(half) * power_of_two(rest);
}

template <typename Real>
PIXELGEN_INLINE Real sigmoid(Real x) {
  return Real(1) / (Real(1) + exp(-x));
}

}  // namespace pixelgen::math
