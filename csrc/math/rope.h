// Rotation of adjacent pairs of channels (a, b) -> (a cos - b sin, a sin + b cos), channel by
// channel, so that the loop over channels is plain arithmetic. `other` is the other channel of the
// pair and `signed_sin` is -sin for the first channel and sin for the second.
#pragma once

#include "host_device.h"

namespace pixelgen::math {

template <typename Real>
PIXELGEN_INLINE Real rotate(Real value, Real other, Real cos, Real signed_sin) {
  return value * cos + other * signed_sin;
}

template <typename Real>
PIXELGEN_INLINE Real rotate_back(Real value, Real other, Real cos, Real signed_sin) {
  return value * cos - other * signed_sin;
}

}  // namespace pixelgen::math
