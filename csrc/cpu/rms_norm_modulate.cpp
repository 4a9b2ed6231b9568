// Bound by bytes: x is read once and y written once (backward: x and grad_y read, grad_x written);
// the second and third pass over a row are served by the first-level cache. One work item is a
// chunk of rows of one image, whose weight, bias, shift and scale are folded into one factor and
// one offset per column before its first row.
#include "../rms_norm_modulate.h"

#include "../math/norm.h"
#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kForwardChunk = 32;    // rows per work item: folding costs 1/32 of a row's work
constexpr int64_t kColumnsPerItem = 64;  // of the second pass of backward

// factor and offset of the row (or of all rows of the image when the modulation is not per token).
// `weight` and `bias` hold the affine weights as Real and may be the same rows as `factor` and
// `offset`.
template <typename Real>
void fold_row(const RmsNormModulateParams& p, int64_t image, int64_t row, const Real* weight,
              const Real* bias, Real* scale, Real* shift, Real* factor, Real* offset) {
  const int64_t row_of_modulation = p.per_token ? row : 0;
  load_row(p.scale, p.modulation_dtype,
           image * p.scale_image_stride + row_of_modulation * p.scale_row_stride, Real(0), scale,
           p.C);
  load_row(p.shift, p.modulation_dtype,
           image * p.shift_image_stride + row_of_modulation * p.shift_row_stride, Real(0), shift,
           p.C);
  for (int64_t c = 0; c < p.C; ++c) {
    const math::Affine<Real> affine = math::fold_modulation(weight[c], bias[c], scale[c], shift[c]);
    factor[c] = affine.factor;
    offset[c] = affine.offset;
  }
}

struct Moments {
  double mean, rstd;
};

template <typename Real>
inline Moments row_moments(const Real* x, int64_t C, bool layer_norm, double eps) {
  Real mean = 0;
  if (layer_norm) mean = sum_columns<Real>(C, [&](int64_t c) { return x[c]; }) / Real(C);
  const Real squares =
      sum_columns<Real>(C, [&](int64_t c) { return (x[c] - mean) * (x[c] - mean); });
  return {double(mean), double(Real(1) / Real(__builtin_sqrt(squares / Real(C) + Real(eps))))};
}

template <typename T, typename Real = typename Stats<T>::type>
void forward(const RmsNormModulateParams& p, int num_threads) {
  const int64_t C = p.C;
  const int64_t chunks_per_image = ceil_div(p.rows_per_image, kForwardChunk);
#pragma omp parallel num_threads(num_threads)
  {
    Scratch<Real, 7> scratch(C);
    Real *weight = scratch.row(0), *bias = scratch.row(1), *scale = scratch.row(2),
         *shift = scratch.row(3), *factor = scratch.row(4), *offset = scratch.row(5),
         *buffer = scratch.row(6);
    load_row(p.weight, p.weight_dtype, 0, Real(1), weight, C);
    load_row(p.bias, p.weight_dtype, 0, Real(0), bias, C);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.num_images * chunks_per_image; ++item) {
      const int64_t image = item / chunks_per_image;
      const int64_t first = item % chunks_per_image * kForwardChunk;
      const int64_t last = min_of(first + kForwardChunk, p.rows_per_image);
      if (!p.per_token) fold_row(p, image, 0, weight, bias, scale, shift, factor, offset);
      for (int64_t row = first; row < last; ++row) {
        if (p.per_token) fold_row(p, image, row, weight, bias, scale, shift, factor, offset);
        const int64_t dense_row = image * p.rows_per_image + row;
        const Real* x =
            as_real(static_cast<const T*>(p.x) + image * p.x_image_stride + row * p.x_row_stride,
                    buffer, C);
        const Moments moments = row_moments(x, C, p.layer_norm, p.eps);
        const Real mean = Real(moments.mean), rstd = Real(moments.rstd);
        if (p.layer_norm) static_cast<Real*>(p.mean)[dense_row] = mean;
        static_cast<Real*>(p.rstd)[dense_row] = rstd;
        T* y = static_cast<T*>(p.y) + dense_row * C;
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          const Real n = math::normalise(x[c], mean, rstd);
          math::from_real(math::modulate(n, math::Affine<Real>{factor[c], offset[c]}), &y[c]);
        }
      }
    }
  }
}

// Sums over the rows of a chunk: of grad and of grad * n, where grad is grad_y, or grad_y * (1 +
// scale) when the modulation is per token (it cannot be taken out of the sum there).
template <typename T, typename Real = typename Stats<T>::type>
void backward_rows(const RmsNormModulateGradParams& g, int num_threads) {
  const RmsNormModulateParams& p = g.forward;
  const int64_t C = p.C;
  const int64_t chunks_per_image = ceil_div(p.rows_per_image, g.rows_per_chunk);
  const Real inverse_width = Real(1) / Real(C);
#pragma omp parallel num_threads(num_threads)
  {
    Scratch<Real, 10> scratch(C);
    Real *weight = scratch.row(0), *bias = scratch.row(1), *scale = scratch.row(2),
         *shift = scratch.row(3), *factor = scratch.row(4), *offset = scratch.row(5),
         *x_buffer = scratch.row(6), *grad_buffer = scratch.row(7), *sum_grad = scratch.row(8),
         *sum_grad_n = scratch.row(9);
    load_row(p.weight, p.weight_dtype, 0, Real(1), weight, C);
    load_row(p.bias, p.weight_dtype, 0, Real(0), bias, C);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.num_images * chunks_per_image; ++item) {
      const int64_t image = item / chunks_per_image;
      const int64_t first = item % chunks_per_image * g.rows_per_chunk;
      const int64_t last = min_of(first + g.rows_per_chunk, p.rows_per_image);
      if (!p.per_token) fold_row(p, image, 0, weight, bias, scale, shift, factor, offset);
      for (int64_t c = 0; c < C; ++c) sum_grad[c] = sum_grad_n[c] = 0;

      for (int64_t row = first; row < last; ++row) {
        if (p.per_token) fold_row(p, image, row, weight, bias, scale, shift, factor, offset);
        const int64_t dense_row = image * p.rows_per_image + row;
        const Real* x =
            as_real(static_cast<const T*>(p.x) + image * p.x_image_stride + row * p.x_row_stride,
                    x_buffer, C);
        const Real* grad_y = as_real(static_cast<const T*>(g.grad_y) +
                                         image * g.grad_y_image_stride + row * g.grad_y_row_stride,
                                     grad_buffer, C);
        const Real mean = p.layer_norm ? static_cast<const Real*>(p.mean)[dense_row] : Real(0);
        const Real rstd = static_cast<const Real*>(p.rstd)[dense_row];

        Real mean_grad_n = 0;
        if (p.layer_norm) {
          mean_grad_n = inverse_width *
                        sum_columns<Real>(C, [&](int64_t c) { return grad_y[c] * factor[c]; });
        }
        const Real mean_grad_n_n =
            inverse_width * sum_columns<Real>(C, [&](int64_t c) {
              return grad_y[c] * factor[c] * math::normalise(x[c], mean, rstd);
            });

        T* grad_x = static_cast<T*>(g.grad_x) + dense_row * C;
        if (!p.per_token) {
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) {
            const Real n = math::normalise(x[c], mean, rstd);
            math::from_real(
                math::norm_grad_x(grad_y[c] * factor[c], n, rstd, mean_grad_n, mean_grad_n_n),
                &grad_x[c]);
            sum_grad[c] += grad_y[c];
            sum_grad_n[c] += grad_y[c] * n;
          }
        } else {
          // offset is not needed any more, shift neither: they hold this row's grad_scale and
          // grad_shift
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) {
            const Real n = math::normalise(x[c], mean, rstd);
            math::from_real(
                math::norm_grad_x(grad_y[c] * factor[c], n, rstd, mean_grad_n, mean_grad_n_n),
                &grad_x[c]);
            const Real grad_m = grad_y[c] * (Real(1) + scale[c]);
            sum_grad[c] += grad_m;
            sum_grad_n[c] += grad_m * n;
            shift[c] = grad_y[c];
            offset[c] = math::modulation_grad_scale(grad_y[c], grad_y[c] * n, weight[c], bias[c]);
          }
          store_row(shift, g.grad_shift, p.modulation_dtype, dense_row * C, C);
          store_row(offset, g.grad_scale, p.modulation_dtype, dense_row * C, C);
        }
      }
      if (g.partials != nullptr) {
        Real* partials = static_cast<Real*>(g.partials) + item * 2 * C;
        store_row(sum_grad, partials, C);
        store_row(sum_grad_n, partials + C, C);
      }
    }
  }
}

// Adds up the partial sums, always in the same order. One work item is a block of columns.
template <typename Real>
void backward_sums(const RmsNormModulateGradParams& g, int num_threads) {
  const RmsNormModulateParams& p = g.forward;
  const int64_t C = p.C;
  const int64_t chunks_per_image = ceil_div(p.rows_per_image, g.rows_per_chunk);
  const bool modulation_sums = p.scale != nullptr && !p.per_token;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < ceil_div(C, kColumnsPerItem); ++item) {
    const int64_t begin = item * kColumnsPerItem;
    const int64_t n = min_of(kColumnsPerItem, C - begin);
    Real weight[kColumnsPerItem], bias[kColumnsPerItem], scale[kColumnsPerItem];
    Real grad_weight[kColumnsPerItem] = {}, grad_bias[kColumnsPerItem] = {};
    load_row(p.weight, p.weight_dtype, begin, Real(1), weight, n);
    load_row(p.bias, p.weight_dtype, begin, Real(0), bias, n);
    for (int64_t i = 0; i < n; ++i) scale[i] = 0;
    for (int64_t image = 0; image < p.num_images; ++image) {
      Real sum_grad[kColumnsPerItem] = {}, sum_grad_n[kColumnsPerItem] = {};
      for (int64_t chunk = 0; chunk < chunks_per_image; ++chunk) {
        const Real* partials = static_cast<const Real*>(g.partials) +
                               (image * chunks_per_image + chunk) * 2 * C + begin;
        for (int64_t i = 0; i < n; ++i) {
          sum_grad[i] += partials[i];
          sum_grad_n[i] += partials[C + i];
        }
      }
      if (modulation_sums) {
        load_row(p.scale, p.modulation_dtype, image * p.scale_image_stride + begin, Real(0), scale,
                 n);
      }
      for (int64_t i = 0; i < n; ++i) {
        grad_bias[i] += (Real(1) + scale[i]) * sum_grad[i];
        grad_weight[i] += (Real(1) + scale[i]) * sum_grad_n[i];
      }
      if (modulation_sums) {
        Real grad_scale[kColumnsPerItem];
        for (int64_t i = 0; i < n; ++i) {
          grad_scale[i] =
              math::modulation_grad_scale(sum_grad[i], sum_grad_n[i], weight[i], bias[i]);
        }
        store_row(sum_grad, g.grad_shift, p.modulation_dtype, image * C + begin, n);
        store_row(grad_scale, g.grad_scale, p.modulation_dtype, image * C + begin, n);
      }
    }
    if (g.grad_weight != nullptr) store_row(grad_weight, g.grad_weight, p.weight_dtype, begin, n);
    if (g.grad_bias != nullptr) store_row(grad_bias, g.grad_bias, p.weight_dtype, begin, n);
  }
}

}  // namespace

Status rms_norm_modulate_fwd(const RmsNormModulateParams& p, int num_threads) {
  if (p.C < 1 || p.C > kMaxWidth) return "C must be between 1 and 8192";
  with_element_type(p.x_dtype, [&](auto element) { forward<decltype(element)>(p, num_threads); });
  return nullptr;
}

Status rms_norm_modulate_bwd(const RmsNormModulateGradParams& g, int num_threads) {
  if (g.forward.C < 1 || g.forward.C > kMaxWidth) return "C must be between 1 and 8192";
  with_element_type(g.forward.x_dtype, [&](auto element) {
    using T = decltype(element);
    backward_rows<T>(g, num_threads);
    if (g.partials != nullptr) backward_sums<typename Stats<T>::type>(g, num_threads);
  });
  return nullptr;
}

}  // namespace pixelgen::cpu::PIXELGEN_ISA
