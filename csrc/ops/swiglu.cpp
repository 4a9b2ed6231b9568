// y = a * sigmoid(a) * b, where a and b are the halves of a row of x. Arithmetic in fp32 (fp64 for
// fp64 x). Every number is read once and written once; half of the time goes into exp and the
// division. One work item is a row.
// The range reduction of exp (math/exp.h) is a sum whose order matters:
// flags: -fno-associative-math
#include "../common/rows.h"
#include "../math/exp.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

struct SwigluFwd {
  Rows<> x;  // (outer, inner, 2 F)
  Dense y;   // (outer, inner, F)
  PIXELGEN_ARGUMENTS(x, y)
};

struct SwigluBwd {
  Rows<> grad_y, x;  // as y and x
  Dense grad_x;      // as x
  PIXELGEN_ARGUMENTS(grad_y, x, grad_x)
};

// Columns that are converted at a time: their buffers stay in the first-level cache.
constexpr int64_t kBlock = 256;

template <typename T, typename Real = typename Stats<T>::type>
void forward(const SwigluFwd& a, int num_threads) {
  const int64_t inner = a.x.size[1], F = a.x.size[2] / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < a.x.size[0] * inner; ++row) {
    const T* x = a.x.as<T>() + a.x.offset(row / inner, row % inner);
    T* y_row = a.y.as<T>() + row * F;
    alignas(64) Real a_buffer[kBlock], b_buffer[kBlock], y_buffer[kBlock];
    for (int64_t first = 0; first < F; first += kBlock) {
      const int64_t n = min_of(kBlock, F - first);
      const Real* gate = as_real(x + first, a_buffer, n);
      const Real* value = as_real(x + F + first, b_buffer, n);
      Real* y = real_target(y_row + first, y_buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * math::sigmoid(gate[i]) * value[i];
      finish_row(y, y_row + first, n);
    }
  }
}

// With s = sigmoid(a): grad_a = grad_y * b * s * (1 + a * (1 - s)), grad_b = grad_y * a * s.
template <typename T, typename Real = typename Stats<T>::type>
void backward(const SwigluBwd& g, int num_threads) {
  const int64_t inner = g.x.size[1], F = g.x.size[2] / 2;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t row = 0; row < g.x.size[0] * inner; ++row) {
    const T* x = g.x.as<T>() + g.x.offset(row / inner, row % inner);
    const T* grad_row = g.grad_y.as<T>() + g.grad_y.offset(row / inner, row % inner);
    T* grad_x = g.grad_x.as<T>() + row * 2 * F;
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

Status swiglu_fwd(const SwigluFwd& a, const Place& place) {
  const int64_t F = a.x.size[2] / 2, rows = a.x.size[0] * a.x.size[1];
  if (2 * F != a.x.size[2]) return "x must have 2 F channels";
  if (!a.y.holds(rows * F, a.x.dtype)) return "y must be as one half of x";
  with_element_type(a.x.dtype,
                    [&](auto element) { forward<decltype(element)>(a, place.num_threads); });
  return nullptr;
}

Status swiglu_bwd(const SwigluBwd& g, const Place& place) {
  const int64_t outer = g.x.size[0], inner = g.x.size[1], F = g.x.size[2] / 2;
  if (2 * F != g.x.size[2]) return "x must have 2 F channels";
  if (!g.grad_y.fits(outer, inner, F) || g.grad_y.dtype != g.x.dtype)
    return "grad_y must be as one half of x";
  if (!g.grad_x.holds(outer * inner * 2 * F, g.x.dtype)) return "grad_x must be as x";
  with_element_type(g.x.dtype,
                    [&](auto element) { backward<decltype(element)>(g, place.num_threads); });
  return nullptr;
}

PIXELGEN_OPS(swiglu, PIXELGEN_OP(swiglu_fwd), PIXELGEN_OP(swiglu_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
