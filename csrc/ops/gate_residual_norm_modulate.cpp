// Bound by bytes: x and y are read once, residual and normed written once (backward: grad_residual,
// grad_normed, residual and y read, grad_x and grad_y written). The loops are those of norm_rows.h.
#include "gate_residual_norm_modulate.h"

#include "../common/norm_rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

template <typename Real>
constexpr DType kRealDType = sizeof(Real) == 4 ? DType::kFloat32 : DType::kFloat64;

// The row at `offset` of a tensor whose dtype is known at run time: in place where it is Y, else
// converted into `buffer`. Y is the dtype of the tensor, or Real.
template <typename Y, typename Real>
const Y* row_as(const View<3>& from, int64_t offset, Real* buffer, int64_t n) {
  if constexpr (IsSame<Y, Real>::value) {
    if (from.dtype != kRealDType<Real>) {
      load_row(from, offset, Real(0), buffer, n);
      return buffer;
    }
  }
  return from.as<Y>() + offset;
}

// The rows of x + gate * y, which become the residual.
template <typename T, typename Y, typename Real = typename Stats<T>::type>
class GatedRows {
 public:
  GatedRows(const NormFwd& p, const GateResidualNormModulateFwd& op)
      : op_(op), C_(p.width()), scratch_(C_) {}

  template <typename Term>
  Real sum(int64_t image, int64_t row, Term term) {
    Real* const gate = scratch_.row(2);
    if (op_.gate.per_row || image != image_of_gate_)
      load_row(op_.gate, op_.gate.row(image, row), Real(0), gate, C_);
    image_of_gate_ = image;
    const T* x = op_.x.as<T>() + op_.x.offset(image, row);
    const Y* y = row_as<Y>(op_.y, op_.y.offset(image, row), scratch_.row(0), C_);
    T* residual = op_.residual.as<T>() + (image * op_.x.size[1] + row) * C_;
    Real* buffer = scratch_.row(1);
    if constexpr (IsSame<T, Real>::value)
      values = residual;
    else
      values = buffer;
    return sum_columns<Real>(C_, [=](int64_t c) {
      T rounded;
      math::from_real(
          math::add_gated(math::to_real<Real>(x[c]), gate[c], math::to_real<Real>(y[c])), &rounded);
      residual[c] = rounded;
      const Real value = math::to_real<Real>(rounded);
      if constexpr (!IsSame<T, Real>::value) buffer[c] = value;
      return term(value);
    });
  }
  const Real* values = nullptr;

 private:
  const GateResidualNormModulateFwd& op_;
  const int64_t C_;
  Scratch<Real, 3> scratch_;
  int64_t image_of_gate_ = -1;
};

// With grad = the gradient of the norm's input + grad_residual: that of x is grad, and those of y
// and gate follow from it.
template <typename T, typename Y, typename Real = typename Stats<T>::type>
class GatedGrads {
 public:
  GatedGrads(const NormBwd& p, const GateResidualNormModulateBwd& op)
      : p_(p),
        op_(op),
        C_(p.width()),
        scratch_(C_),
        gate_(scratch_.row(4)),
        gate_sums_(scratch_.row(1), scratch_.row(2), C_) {}
  GatedGrads(const GatedGrads&) = delete;  // its pointers are into itself

  void start_chunk(const Chunk& chunk) { start_sum(chunk.image, chunk.first); }
  auto start_row(int64_t image, int64_t row) {
    const int64_t dense_row = image * p_.rows_per_image() + row;
    if (op_.gate.per_row) start_sum(image, row);  // of one row
    const Real* gate = gate_;
    const Y* y = row_as<Y>(op_.y, op_.y.offset(image, row), scratch_.row(0), C_);
    const T* grad_residual = op_.grad_residual.as<T>() + op_.grad_residual.offset(image, row);
    T* grad_x = p_.grad_x.as<T>() + dense_row * C_;
    Y* grad_y = grad_y_target(dense_row);
    Real* sum_gate = gate_sums_.block();
    return [=](int64_t c, Real grad_of_norm) {
      const Real grad = grad_of_norm + math::to_real<Real>(grad_residual[c]);
      math::from_real(grad, &grad_x[c]);
      const math::BranchGrads<Real> grads =
          math::branch_grads(gate[c], math::to_real<Real>(y[c]), grad);
      math::from_real(grads.y, &grad_y[c]);
      sum_gate[c] += grads.gate;
    };
  }
  void finish_row(int64_t image, int64_t row) {
    const int64_t first = (image * p_.rows_per_image() + row) * C_;
    if (!grad_y_is_direct()) store_row(scratch_.row(3), op_.grad_y, first, C_);
    if (op_.gate.per_row)
      store_row(gate_sums_.total(), op_.grad_gate, first, C_);
    else
      gate_sums_.end_row();
  }
  void finish_chunk(int64_t item) {
    if (p_.own_partials == nullptr) return;
    store_row(gate_sums_.total(), static_cast<Real*>(p_.own_partials) + item * C_, C_);
  }

 private:
  void start_sum(int64_t image, int64_t row) {
    load_row(op_.gate, op_.gate.row(image, row), Real(0), gate_, C_);
    gate_sums_.clear();
  }
  bool grad_y_is_direct() const {
    return !IsSame<Y, Real>::value || op_.y.dtype == kRealDType<Real>;
  }
  Y* grad_y_target(int64_t dense_row) {
    if constexpr (IsSame<Y, Real>::value) {
      if (!grad_y_is_direct()) return scratch_.row(3);
    }
    return op_.grad_y.as<Y>() + dense_row * C_;
  }

  const NormBwd& p_;
  const GateResidualNormModulateBwd& op_;
  const int64_t C_;
  Scratch<Real, 5> scratch_;
  Real* const gate_;
  ColumnSums<Real> gate_sums_;
};

// grad_gate from the partial sums. One work item is a block of columns.
template <typename Real>
void gate_sums(const NormBwd& p, const Dense& grad_gate, int num_threads) {
  if (p.own_partials == nullptr) return;
  const int64_t C = p.width(), chunks_per_image = ceil_div(p.rows_per_image(), p.rows_per_chunk);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < ceil_div(C, kColumnsPerItem); ++item) {
    const int64_t begin = item * kColumnsPerItem;
    const int64_t n = min_of(kColumnsPerItem, C - begin);
    for (int64_t image = 0; image < p.num_images(); ++image) {
      double sum[kColumnsPerItem];
      const Real* partials =
          static_cast<const Real*>(p.own_partials) + image * chunks_per_image * C + begin;
      add_chunks(partials, chunks_per_image, C, sum, n);
      store_row(sum, grad_gate, image * C + begin, n);
    }
  }
}

// Calls fn(T{}, Y{}): Y is T where x and y have one dtype, else y is converted row by row.
template <typename Fn>
void with_element_types(DType x_dtype, DType y_dtype, Fn fn) {
  with_element_type(x_dtype, [&](auto element) {
    using T = decltype(element);
    if (x_dtype == y_dtype)
      fn(element, element);
    else
      fn(element, typename Stats<T>::type{});
  });
}

}  // namespace

Status gate_residual_norm_modulate_fwd(const GateResidualNormModulateFwd& a, const Place& place) {
  NormFwd p;
  const Status status = make_norm(a, &p);
  if (status != nullptr) return status;
  with_element_types(a.x.dtype, a.y.dtype, [&](auto x_element, auto y_element) {
    using T = decltype(x_element);
    norm_forward<T, GatedRows<T, decltype(y_element)>>(p, a, place.num_threads);
  });
  return nullptr;
}

Status gate_residual_norm_modulate_bwd(const GateResidualNormModulateBwd& a, const Place& place) {
  NormBwd p;
  const Status status = make_norm(a, kBackwardChunks, place, &p);
  if (status != nullptr) return status;
  GateResidualNormModulateBwd op = a;
  if (!fill_in(p.x, place, &p.grad_y) || !fill_in(p.x, place, &op.grad_residual)) return kNoMemory;
  with_element_types(p.x.dtype, a.y.dtype, [&](auto x_element, auto y_element) {
    using T = decltype(x_element);
    norm_backward_rows<T, GatedGrads<T, decltype(y_element)>>(p, op, place.num_threads);
    norm_backward_sums<typename Stats<T>::type>(p, place.num_threads);
    gate_sums<typename Stats<T>::type>(p, a.grad_gate, place.num_threads);
  });
  return nullptr;
}

PIXELGEN_OPS(gate_residual_norm_modulate, PIXELGEN_OP(gate_residual_norm_modulate_fwd),
             PIXELGEN_OP(gate_residual_norm_modulate_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
