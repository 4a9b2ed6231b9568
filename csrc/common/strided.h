// Pieces of a row that may have a stride.
#pragma once

#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// convert(element) of n elements. Constant strides, of neighbours (1) and of the channels of an RGB
// pixel (3), become vector loads.
template <typename Real, typename E, typename Convert>
inline void gather(const E* source, int64_t stride, Real* out, int64_t n, Convert convert) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = convert(source[i]);
  } else if (stride == 3) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = convert(source[3 * i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = convert(source[i * stride]);
  }
}

// n elements, `stride` apart, of a buffer whose dtype is known at run time, as Real: in place where
// that is what they are, else in `buffer`.
template <typename Real>
inline const Real* as_real(const void* base, DType dtype, int64_t offset, int64_t stride,
                           Real* buffer, int64_t n) {
  const Real* in_place = nullptr;
  with_element_type(dtype, [&](auto element) {
    using E = decltype(element);
    const E* source = static_cast<const E*>(base) + offset;
    if constexpr (IsSame<E, Real>::value) {
      if (stride == 1) {
        in_place = source;
        return;
      }
    }
    gather(source, stride, buffer, n, [](E value) { return math::to_real<Real>(value); });
  });
  return in_place != nullptr ? in_place : buffer;
}

// The same along dimension `dim` of a view, the first at these indices.
template <typename Real, int kRank, typename... Indices>
inline const Real* as_real(const View<kRank>& view, int dim, Real* buffer, int64_t n,
                           Indices... first) {
  return as_real(view.data, view.dtype, view.offset(first...), view.stride[dim], buffer, n);
}

// A number of a vector of any dtype.
template <typename Real>
inline Real number(const View<1>& vector, int64_t index) {
  Real value;
  load_row(vector.data, vector.dtype, vector.offset(index), Real(0), &value, 1);
  return value;
}

}  // namespace
}  // namespace pixelgen::cpu::PIXELGEN_ISA
