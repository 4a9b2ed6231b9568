// Every number is read once and written once; half of the time goes into exp and the division. One
// work item is a row.
#include "../swiglu.h"

#include "../math/exp.h"
#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// Columns that are converted at a time: their buffers stay in the first-level cache.
constexpr int64_t kBlock = 256;

template <typename T, typename Real = typename Stats<T>::type>
void forward(const SwigluParams& p, int num_threads) {
  const int64_t F = p.F;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < p.num_outer * p.num_inner; ++row) {
    const T* x = static_cast<const T*>(p.x) + row / p.num_inner * p.x_outer_stride +
                 row % p.num_inner * p.x_inner_stride;
    T* y_row = static_cast<T*>(p.y) + row * F;
    alignas(64) Real a_buffer[kBlock], b_buffer[kBlock], y_buffer[kBlock];
    for (int64_t first = 0; first < F; first += kBlock) {
      const int64_t n = min_of(kBlock, F - first);
      const Real* a = as_real(x + first, a_buffer, n);
      const Real* b = as_real(x + F + first, b_buffer, n);
      Real* y = real_target(y_row + first, y_buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = a[i] * math::sigmoid(a[i]) * b[i];
      finish_row(y, y_row + first, n);
    }
  }
}

// With s = sigmoid(a): grad_a = grad_y * b * s * (1 + a * (1 - s)), grad_b = grad_y * a * s.
template <typename T, typename Real = typename Stats<T>::type>
void backward(const SwigluGradParams& g, int num_threads) {
  const SwigluParams& p = g.forward;
  const int64_t F = p.F;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < p.num_outer * p.num_inner; ++row) {
    const int64_t outer = row / p.num_inner, inner = row % p.num_inner;
    const T* x = static_cast<const T*>(p.x) + outer * p.x_outer_stride + inner * p.x_inner_stride;
    const T* grad_row = static_cast<const T*>(g.grad_y) + outer * g.grad_y_outer_stride +
                        inner * g.grad_y_inner_stride;
    T* grad_x = static_cast<T*>(g.grad_x) + row * 2 * F;
    alignas(64) Real a_buffer[kBlock], b_buffer[kBlock], grad_buffer[kBlock];
    alignas(64) Real grad_a_buffer[kBlock], grad_b_buffer[kBlock];
    for (int64_t first = 0; first < F; first += kBlock) {
      const int64_t n = min_of(kBlock, F - first);
      const Real* a = as_real(x + first, a_buffer, n);
      const Real* b = as_real(x + F + first, b_buffer, n);
      const Real* grad_y = as_real(grad_row + first, grad_buffer, n);
      Real* grad_a = real_target(grad_x + first, grad_a_buffer);
      Real* grad_b = real_target(grad_x + F + first, grad_b_buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const Real s = math::sigmoid(a[i]);
        grad_a[i] = grad_y[i] * b[i] * s * (Real(1) + a[i] * (Real(1) - s));
        grad_b[i] = grad_y[i] * a[i] * s;
      }
      finish_row(grad_a, grad_x + first, n);
      finish_row(grad_b, grad_x + F + first, n);
    }
  }
}

}  // namespace

Status swiglu_fwd(const SwigluParams& p, int num_threads) {
  with_element_type(p.dtype, [&](auto element) { forward<decltype(element)>(p, num_threads); });
  return nullptr;
}

Status swiglu_bwd(const SwigluGradParams& g, int num_threads) {
  with_element_type(g.forward.dtype,
                    [&](auto element) { backward<decltype(element)>(g, num_threads); });
  return nullptr;
}

}  // namespace pixelgen::cpu::PIXELGEN_ISA
