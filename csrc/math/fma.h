// The fused multiply-add, spelt out: where results have to be the same bits in every loop and on
// every device, compilers may not contract sums of products as the code around them suggests.
#pragma once

#include "host_device.h"

#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define PIXELGEN_HAS_FMA 1
#else
#define PIXELGEN_HAS_FMA 0
#endif

namespace pixelgen::math {

// a * b + c, rounded once where the processor can.
PIXELGEN_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDACC__)
  return fmaf(a, b, c);
#elif PIXELGEN_HAS_FMA
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace pixelgen::math
