// bf16 and fp16 as bit patterns, for the CPU: branch-free, so that the compiler vectorises them for
// any instruction set. Rounds to nearest even; NaN stays NaN, infinities and subnormals are kept.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace pixelgen::math {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PIXELGEN_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

PIXELGEN_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename Real>
PIXELGEN_INLINE Real to_real(float value) {
  return Real(value);
}
template <typename Real>
PIXELGEN_INLINE Real to_real(double value) {
  return Real(value);
}
template <typename Real>
PIXELGEN_INLINE Real to_real(BFloat16 value) {
  return Real(float_of(uint32_t(value.bits) << 16));
}
template <typename Real>
PIXELGEN_INLINE Real to_real(Float16 value) {
  constexpr uint32_t kRebias = uint32_t(127 - 15) << 23;
  constexpr uint32_t kSmallestNormal = uint32_t(127 - 14) << 23;  // 2^-14 as a float
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const uint32_t normal = magnitude + kRebias;
  // the hidden bit is added, then taken off again: exact
  const uint32_t subnormal =
      bits_of(float_of(magnitude + kSmallestNormal) - float_of(kSmallestNormal));
  uint32_t bits = magnitude < (uint32_t(1) << 23) ? subnormal : normal;
  bits = magnitude >= (uint32_t(31) << 23) ? normal + kRebias : bits;  // infinity and NaN
  return Real(float_of(bits | (uint32_t(value.bits & 0x8000) << 16)));
}

template <typename Real>
PIXELGEN_INLINE void from_real(Real value, float* out) {
  *out = float(value);
}
template <typename Real>
PIXELGEN_INLINE void from_real(Real value, double* out) {
  *out = double(value);
}
template <typename Real>
PIXELGEN_INLINE void from_real(Real value, BFloat16* out) {
  const uint32_t bits = bits_of(float(value));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = uint16_t(is_nan ? 0x7fc0 : rounded);
}
template <typename Real>
PIXELGEN_INLINE void from_real(Real value, Float16* out) {
  const uint32_t bits = bits_of(float(value));
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal =
      (magnitude + 0xfff + ((magnitude >> 13) & 1) - (uint32_t(127 - 15) << 23)) >> 13;
  // 0.5 has the spacing of fp16's subnormals, 2^-24, so the addition rounds to them
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t half = magnitude < (uint32_t(127 - 14) << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  out->bits = uint16_t(half | ((bits >> 16) & 0x8000));
}

}  // namespace pixelgen::math
