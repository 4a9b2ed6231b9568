// Bound by bytes: x is read once and y written once (backward: x and grad_y read, grad_x written).
// The loops are those of norm_rows.h.
#include "rms_norm_modulate.h"

#include "../common/norm_rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// The rows of x, as they are.
template <typename T, typename Real = typename Stats<T>::type>
class PlainRows {
 public:
  PlainRows(const NormFwd& p, const RmsNormModulateFwd&) : x_(p.x), scratch_(x_.size[2]) {}

  template <typename Term>
  Real sum(int64_t image, int64_t row, Term term) {
    const RowInput<Real, T> x{scratch_.row(0),
                              x_.as<T>() + image * x_.stride[0] + row * x_.stride[1]};
    values = x.values();
    return sum_columns<Real>(x_.size[2], [=](int64_t c) { return term(x.first(c)); });
  }
  const Real* values = nullptr;

 private:
  const View<3>& x_;
  Scratch<Real, 1> scratch_;
};

// The gradient of the norm's input is grad_x.
template <typename T, typename Real = typename Stats<T>::type>
class PlainGrads {
 public:
  PlainGrads(const NormBwd& p, const RmsNormModulateBwd&) : p_(p) {}

  void start_chunk(const Chunk&) {}
  auto start_row(int64_t image, int64_t row) const {
    T* grad_x = p_.grad_x.as<T>() + (image * p_.rows_per_image() + row) * p_.width();
    return [=](int64_t c, Real grad) { math::from_real(grad, &grad_x[c]); };
  }
  void finish_row(int64_t, int64_t) {}
  void finish_chunk(int64_t) {}

 private:
  const NormBwd& p_;
};

}  // namespace

Status rms_norm_modulate_fwd(const RmsNormModulateFwd& a, const Place& place) {
  NormFwd p;
  const Status status = make_norm(a, &p);
  if (status != nullptr) return status;
  with_element_type(p.x.dtype, [&](auto element) {
    using T = decltype(element);
    norm_forward<T, PlainRows<T>>(p, a, place.num_threads);
  });
  return nullptr;
}

Status rms_norm_modulate_bwd(const RmsNormModulateBwd& a, const Place& place) {
  NormBwd p;
  const Status status = make_norm(a, kBackwardChunks, place, &p);
  if (status != nullptr) return status;
  if (!fill_in(p.x, place, &p.grad_y)) return kNoMemory;
  with_element_type(p.x.dtype, [&](auto element) {
    using T = decltype(element);
    norm_backward_rows<T, PlainGrads<T>>(p, a, place.num_threads);
    norm_backward_sums<typename Stats<T>::type>(p, place.num_threads);
  });
  return nullptr;
}

PIXELGEN_OPS(rms_norm_modulate, PIXELGEN_OP(rms_norm_modulate_fwd),
             PIXELGEN_OP(rms_norm_modulate_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
