// What the distances share on every device.
#pragma once

#include "tensor.h"

namespace pixelgen {

// Of sums and statistics: fp64 where either tensor is.
PIXELGEN_INLINE DType stats_dtype(DType a, DType b) {
  return a == DType::kFloat64 || b == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Makes dimensions kDim and kDim + 1 one, of the sizes 1 and their product, where they are evenly
// spaced in all views.
template <int kDim, typename... Views>
PIXELGEN_INLINE void join(Views&... views) {
  if (((views.stride[kDim] == views.size[kDim + 1] * views.stride[kDim + 1]) && ...))
    ((views.size[kDim + 1] *= views.size[kDim], views.size[kDim] = 1), ...);
}

}  // namespace pixelgen
