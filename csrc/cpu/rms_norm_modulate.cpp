// Bound by bytes: x is read once and y written once (backward: x and grad_y read, grad_x written).
// The loops are those of norm_rows.h.
#include "../rms_norm_modulate.h"

#include "norm_rows.h"
#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// The rows of x, as they are.
template <typename T, typename Real = typename Stats<T>::type>
class PlainRows {
 public:
  explicit PlainRows(const RmsNormModulateParams& params) : p_(params), scratch_(params.C) {}

  template <typename Term>
  Real sum(int64_t image, int64_t row, Term term) {
    const RowInput<Real, T> x{
        scratch_.row(0),
        static_cast<const T*>(p_.x) + image * p_.x_image_stride + row * p_.x_row_stride};
    values = x.values();
    return sum_columns<Real>(p_.C, [=](int64_t c) { return term(x.first(c)); });
  }
  const Real* values = nullptr;

 private:
  const RmsNormModulateParams& p_;
  Scratch<Real, 1> scratch_;
};

// The gradient of the norm's input is grad_x.
template <typename T, typename Real = typename Stats<T>::type>
class PlainGrads {
 public:
  explicit PlainGrads(const RmsNormModulateGradParams& params) : g_(params) {}

  void start_chunk(const Chunk&) {}
  auto start_row(int64_t image, int64_t row) const {
    const RmsNormModulateParams& p = g_.forward;
    T* grad_x = static_cast<T*>(g_.grad_x) + (image * p.rows_per_image + row) * p.C;
    return [=](int64_t c, Real grad) { math::from_real(grad, &grad_x[c]); };
  }
  void finish_row(int64_t, int64_t) {}
  void finish_chunk(int64_t) {}

 private:
  const RmsNormModulateGradParams& g_;
};

}  // namespace

Status rms_norm_modulate_fwd(const RmsNormModulateParams& p, int num_threads) {
  if (p.C < 1 || p.C > kMaxWidth) return "C must be between 1 and 8192";
  with_element_type(p.x_dtype, [&](auto element) {
    using T = decltype(element);
    norm_forward<T, PlainRows<T>>(p, p, num_threads);
  });
  return nullptr;
}

Status rms_norm_modulate_bwd(const RmsNormModulateGradParams& g, int num_threads) {
  if (g.forward.C < 1 || g.forward.C > kMaxWidth) return "C must be between 1 and 8192";
  with_element_type(g.forward.x_dtype, [&](auto element) {
    using T = decltype(element);
    norm_backward_rows<T, PlainGrads<T>>(g, g, num_threads);
    norm_backward_sums<typename Stats<T>::type>(g, num_threads);
  });
  return nullptr;
}

}  // namespace pixelgen::cpu::PIXELGEN_ISA
