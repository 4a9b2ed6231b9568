// Two standard normal numbers from two random words, by Box and Muller:
//   r = sqrt(-2 ln(w0 2^-32 + 2^-33)), a = 2 pi (w1 >> 8) 2^-24; r cos(a) and r sin(a).
// The sum under the logarithm is rounded to fp32, where all 32 bits of w0 count while it is small,
// so r reaches 6.8 and is never the log of zero. From there on at most 3 ulp from the exact values
// (4 on a processor without a fused multiply-add).
//
// Branch-free, so that compilers vectorise it. Every operation is one that IEEE 754 rounds
// correctly, so all processors that have a fused multiply-add give the same bits, GPUs too.
#pragma once

#include <cstdint>

#include "fma.h"
#include "half.h"
#include "host_device.h"
#include "philox.h"

#ifdef __ASSOCIATIVE_MATH__
#error \
    "reordered sums undo the range reduction of the logarithm; compile with -fno-associative-math"
#endif

namespace pixelgen::math {

// Of 0 or a normal x > 0, correctly rounded.
PIXELGEN_INLINE float square_root(float x) {
#ifdef __CUDACC__  // sqrtf for such x, without its call for subnormal ones, around which registers
                   // spill
  const float inverse = rsqrtf(x), root = x * inverse;
  const float exact = fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
  return x > 0.0f ? exact : 0.0f;
#else
  return __builtin_sqrtf(x);
#endif
}

// ln(x) of a normal x > 0. x = 2^e m with sqrt(1/2) <= m < sqrt(2); ln(m) by a polynomial in m - 1.
PIXELGEN_INLINE float log(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3;  // sqrt(1/2) as a float
  const uint32_t bits = bits_of(x);
  const int32_t e = int32_t(bits - kSqrtHalf) >> 23;
  const float f = float_of(bits - (uint32_t(e) << 23)) - 1.0f;
  const float n = float(e);
  float p = 7.0376836292e-2f;  // coefficients of Cephes' logf
  p = multiply_add(p, f, -1.1514610310e-1f);
  p = multiply_add(p, f, 1.1676998740e-1f);
  p = multiply_add(p, f, -1.2420140846e-1f);
  p = multiply_add(p, f, 1.4249322787e-1f);
  p = multiply_add(p, f, -1.6668057665e-1f);
  p = multiply_add(p, f, 2.0000714765e-1f);
  p = multiply_add(p, f, -2.4999993993e-1f);
  p = multiply_add(p, f, 3.3333331174e-1f);
  const float square = f * f;
  p = p * f * square;
  // ln 2 in two parts, n times the first is exact
  p = multiply_add(n, -2.12194440e-4f, p);
  p = multiply_add(square, -0.5f, p);
  return multiply_add(n, 0.693359375f, f + p);
}

struct Rotation {
  float cos, sin;
};

// Of 2 pi k 2^-24, k < 2^24. The nearest quarter turn is taken off in integers, so nothing is lost;
// polynomials in s = rest / (eighth of a turn), |s| <= 1.
PIXELGEN_INLINE Rotation rotation(uint32_t k) {
  const uint32_t quarter = (k + (1u << 21)) >> 22;
  const float s = float(int32_t(k - (quarter << 22))) * 0x1p-21f;
  const float t = s * s;
  float p = -3.5978981e-5f;  // minimax, as the ones of the cosine
  p = multiply_add(p, t, 2.4900492e-3f);
  p = multiply_add(p, t, -8.0745459e-2f);
  p = multiply_add(p, t, -2.1855694e-8f);  // the part of pi / 4 that the fp32 number lacks
  const float sine = multiply_add(s, 0.78539819f, s * p);
  float q = 3.5313344e-6f;
  q = multiply_add(q, t, -3.25942005e-4f);
  q = multiply_add(q, t, 1.5854327e-2f);
  q = multiply_add(q, t, -3.08425128e-1f);
  const float cosine = multiply_add(q, t, 1.0f);
  // quarter 1: (-sine, cosine), 2: (-cosine, -sine), 3: (sine, -cosine), 4 is 0
  const bool is_odd = (quarter & 1) != 0;
  const uint32_t cos_bits = bits_of(is_odd ? sine : cosine) ^ ((quarter + 1) & 2) << 30;
  const uint32_t sin_bits = bits_of(is_odd ? cosine : sine) ^ (quarter & 2) << 30;
  return {float_of(cos_bits), float_of(sin_bits)};
}

struct NormalPair {
  float first, second;
};

PIXELGEN_INLINE NormalPair box_muller(uint32_t w0, uint32_t w1) {
  const float uniform = float(w0) * 0x1p-32f + 0x1p-33f;  // the product is exact
  const float radius = square_root(-2.0f * log(uniform));
  const Rotation turn = rotation(w1 >> 8);
  return {radius * turn.cos, radius * turn.sin};
}

// The numbers of elements 4 group to 4 group + 3.
struct NormalGroup {
  NormalPair low, high;
};

PIXELGEN_INLINE NormalGroup philox_normal(const PhiloxStream& stream, uint32_t group) {
  const PhiloxWords words = philox_words(stream, group);
  return {box_muller(words.w0, words.w1), box_muller(words.w2, words.w3)};
}

}  // namespace pixelgen::math
