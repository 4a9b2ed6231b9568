// Bound by bytes: x and y are read once, residual and normed written once (backward: grad_residual,
// grad_normed, residual and y read, grad_x and grad_y written). The loops are those of norm_rows.h.
#include "../gate_residual_norm_modulate.h"

#include "norm_rows.h"
#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// The row at `offset` of a buffer whose dtype is known at run time: in place where it is Y, else
// converted into `buffer`. Y is the dtype of the buffer, or Real.
template <typename Y, typename Real>
const Y* row_as(const void* base, DType dtype, int64_t offset, Real* buffer, int64_t n) {
  if constexpr (IsSame<Y, Real>::value) {
    constexpr DType kReal = sizeof(Real) == 4 ? DType::kFloat32 : DType::kFloat64;
    if (dtype != kReal) {
      load_row(base, dtype, offset, Real(0), buffer, n);
      return buffer;
    }
  }
  return static_cast<const Y*>(base) + offset;
}

// The gates of one row, or of all rows of an image.
template <typename Real>
class Gate {
 public:
  Gate(const GatedBranch& branch, int64_t C) : b_(branch), C_(C), scratch_(C) {}

  void read(int64_t image, int64_t row) {
    const int64_t row_of_gate = b_.gate_per_token ? row : 0;
    load_row(b_.gate, b_.gate_dtype,
             image * b_.gate_image_stride + row_of_gate * b_.gate_row_stride, Real(0),
             scratch_.row(0), C_);
  }
  const Real* values() { return scratch_.row(0); }

 private:
  const GatedBranch& b_;
  const int64_t C_;
  Scratch<Real, 1> scratch_;
};

// The rows of x + gate * y, which become the residual.
template <typename T, typename Y, typename Real = typename Stats<T>::type>
class GatedRows {
 public:
  explicit GatedRows(const GateResidualNormModulateParams& params)
      : p_(params), gate_(params.branch, params.norm.C), scratch_(params.norm.C) {}

  template <typename Term>
  Real sum(int64_t image, int64_t row, Term term) {
    const RmsNormModulateParams& p = p_.norm;
    const GatedBranch& b = p_.branch;
    if (b.gate_per_token || image != image_of_gate_) gate_.read(image, row);
    image_of_gate_ = image;
    const Real* gate = gate_.values();
    const T* x = static_cast<const T*>(p.x) + image * p.x_image_stride + row * p.x_row_stride;
    const Y* y = row_as<Y>(b.y, b.y_dtype, image * b.y_image_stride + row * b.y_row_stride,
                           scratch_.row(0), p.C);
    T* residual = static_cast<T*>(p_.residual) + (image * p.rows_per_image + row) * p.C;
    Real* buffer = scratch_.row(1);
    if constexpr (IsSame<T, Real>::value)
      values = residual;
    else
      values = buffer;
    return sum_columns<Real>(p.C, [=](int64_t c) {
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
  const GateResidualNormModulateParams& p_;
  Gate<Real> gate_;
  Scratch<Real, 2> scratch_;
  int64_t image_of_gate_ = -1;
};

// With grad = the gradient of the norm's input + grad_residual: that of x is grad, and those of y
// and gate follow from it.
template <typename T, typename Y, typename Real = typename Stats<T>::type>
class GatedGrads {
 public:
  explicit GatedGrads(const GateResidualNormModulateGradParams& params)
      : g_(params),
        p_(params.norm.forward),
        gate_(params.branch, p_.C),
        scratch_(p_.C),
        gate_sums_(scratch_.row(1), scratch_.row(2), p_.C) {}
  GatedGrads(const GatedGrads&) = delete;  // its pointers are into itself

  void start_chunk(const Chunk& chunk) {
    gate_.read(chunk.image, chunk.first);
    gate_sums_.clear();
  }
  auto start_row(int64_t image, int64_t row) {
    const GatedBranch& b = g_.branch;
    const int64_t dense_row = image * p_.rows_per_image + row;
    if (b.gate_per_token) {  // a sum of one row
      gate_.read(image, row);
      gate_sums_.clear();
    }
    const Real* gate = gate_.values();
    const Y* y = row_as<Y>(b.y, b.y_dtype, image * b.y_image_stride + row * b.y_row_stride,
                           scratch_.row(0), p_.C);
    const T* grad_residual = static_cast<const T*>(g_.grad_residual) +
                             image * g_.grad_residual_image_stride +
                             row * g_.grad_residual_row_stride;
    T* grad_x = static_cast<T*>(g_.norm.grad_x) + dense_row * p_.C;
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
    const GatedBranch& b = g_.branch;
    const int64_t dense_row = image * p_.rows_per_image + row;
    if (!grad_y_is_direct()) {
      store_row(scratch_.row(3), g_.grad_y, b.y_dtype, dense_row * p_.C, p_.C);
    }
    if (b.gate_per_token) {
      store_row(gate_sums_.total(), g_.grad_gate, b.gate_dtype, dense_row * p_.C, p_.C);
    } else {
      gate_sums_.end_row();
    }
  }
  void finish_chunk(int64_t item) {
    if (g_.gate_partials == nullptr) return;
    store_row(gate_sums_.total(), static_cast<Real*>(g_.gate_partials) + item * p_.C, p_.C);
  }

 private:
  bool grad_y_is_direct() const {
    if constexpr (!IsSame<Y, Real>::value) return true;
    return g_.branch.y_dtype == (sizeof(Real) == 4 ? DType::kFloat32 : DType::kFloat64);
  }
  Y* grad_y_target(int64_t dense_row) {
    if constexpr (IsSame<Y, Real>::value) {
      if (!grad_y_is_direct()) return scratch_.row(3);
    }
    return static_cast<Y*>(g_.grad_y) + dense_row * p_.C;
  }

  const GateResidualNormModulateGradParams& g_;
  const RmsNormModulateParams& p_;
  Gate<Real> gate_;
  Scratch<Real, 4> scratch_;
  ColumnSums<Real> gate_sums_;
};

// grad_gate from the partial sums. One work item is a block of columns.
template <typename Real>
void gate_sums(const GateResidualNormModulateGradParams& g, int num_threads) {
  if (g.gate_partials == nullptr) return;
  const RmsNormModulateParams& p = g.norm.forward;
  const int64_t chunks_per_image = ceil_div(p.rows_per_image, g.norm.rows_per_chunk);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < ceil_div(p.C, kColumnsPerItem); ++item) {
    const int64_t begin = item * kColumnsPerItem;
    const int64_t n = min_of(kColumnsPerItem, p.C - begin);
    for (int64_t image = 0; image < p.num_images; ++image) {
      double sum[kColumnsPerItem];
      const Real* partials =
          static_cast<const Real*>(g.gate_partials) + image * chunks_per_image * p.C + begin;
      add_chunks(partials, chunks_per_image, p.C, sum, n);
      store_row(sum, g.grad_gate, g.branch.gate_dtype, image * p.C + begin, n);
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

Status gate_residual_norm_modulate_fwd(const GateResidualNormModulateParams& p, int num_threads) {
  if (p.norm.C < 1 || p.norm.C > kMaxWidth) return "C must be between 1 and 8192";
  with_element_types(p.norm.x_dtype, p.branch.y_dtype, [&](auto x_element, auto y_element) {
    using T = decltype(x_element);
    norm_forward<T, GatedRows<T, decltype(y_element)>>(p.norm, p, num_threads);
  });
  return nullptr;
}

Status gate_residual_norm_modulate_bwd(const GateResidualNormModulateGradParams& g,
                                       int num_threads) {
  const RmsNormModulateParams& p = g.norm.forward;
  if (p.C < 1 || p.C > kMaxWidth) return "C must be between 1 and 8192";
  with_element_types(p.x_dtype, g.branch.y_dtype, [&](auto x_element, auto y_element) {
    using T = decltype(x_element);
    norm_backward_rows<T, GatedGrads<T, decltype(y_element)>>(g.norm, g, num_threads);
    norm_backward_sums<typename Stats<T>::type>(g.norm, num_threads);
    gate_sums<typename Stats<T>::type>(g, num_threads);
  });
  return nullptr;
}

}  // namespace pixelgen::cpu::PIXELGEN_ISA
