// Forward and backward of a norm with shift and scale, row by row, for the ops that end in one. The
// op says where a row comes from (`Source`) and where its gradient goes (`Grads`).
//
// One work item is a chunk of rows of one image, whose weight, bias, shift and scale are folded
// into one factor and one offset per column before its first row. The first loop over a row
// converts it, later ones are served by the first-level cache.
#pragma once

#include "../math/norm.h"
#include "norm.h"
#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kForwardChunk = 32;    // rows per work item: folding costs 1/32 of a row's work
constexpr int64_t kColumnsPerItem = 64;  // of the second pass of backward
constexpr ChunkRule kBackwardChunks{64, 50, INT64_MAX};

// Sums of columns over the rows of a chunk, in two levels: the rounding errors of one long sum grow
// with its length.
template <typename Real>
class ColumnSums {
 public:
  ColumnSums(Real* block, Real* total, int64_t C) : block_(block), total_(total), C_(C) {}

  void clear() {
    for (int64_t c = 0; c < C_; ++c) block_[c] = total_[c] = 0;
    rows_ = 0;
  }
  Real* block() { return block_; }  // to which a row adds
  void end_row() {
    if (++rows_ == kRowsPerBlock) flush();
  }
  const Real* total() {
    flush();
    return total_;
  }

 private:
  static constexpr int kRowsPerBlock = 16;
  void flush() {
    for (int64_t c = 0; c < C_; ++c) {
      total_[c] += block_[c];
      block_[c] = 0;
    }
    rows_ = 0;
  }
  Real *block_, *total_;
  int64_t C_;
  int rows_ = 0;
};

// A row of T as Real: the first loop over it calls first(c) for every column, later ones read
// values().
template <typename Real, typename T>
struct RowInput {
  Real* buffer;
  const T* row;

  Real first(int64_t c) const {
    if constexpr (IsSame<Real, T>::value)
      return row[c];
    else
      return buffer[c] = math::to_real<Real>(row[c]);
  }
  const Real* values() const {
    if constexpr (IsSame<Real, T>::value)
      return row;
    else
      return buffer;
  }
};

// Weight, bias, shift and scale of one row (or of all rows of an image when they are not per
// token).
template <typename Real>
class Modulation {
 public:
  explicit Modulation(const NormRows& rows) : p_(rows), scratch_(rows.width()) {
    load_row(p_.weight, 0, Real(1), weight, p_.width());
    load_row(p_.bias, 0, Real(0), bias, p_.width());
  }
  Modulation(const Modulation&) = delete;  // its pointers are into itself

  void read(int64_t image, int64_t row) {
    const int64_t C = p_.width();
    load_row(p_.scale, p_.scale.row(image, row), Real(0), scale, C);
    load_row(p_.shift, p_.shift.row(image, row), Real(0), shift, C);
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const math::Affine<Real> affine =
          math::fold_modulation(weight[c], bias[c], scale[c], shift[c]);
      factor[c] = affine.factor;
      offset[c] = affine.offset;
    }
  }

 private:
  const NormRows& p_;
  Scratch<Real, 6> scratch_;

 public:
  Real *const weight = scratch_.row(0), *const bias = scratch_.row(1),
              *const scale = scratch_.row(2), *const shift = scratch_.row(3),
              *const factor = scratch_.row(4), *const offset = scratch_.row(5);
};

// The rows of a chunk: one work item.
struct Chunk {
  Chunk(const NormRows& p, int64_t item, int64_t rows_per_chunk) {
    const int64_t chunks_per_image = ceil_div(p.rows_per_image(), rows_per_chunk);
    image = item / chunks_per_image;
    first = item % chunks_per_image * rows_per_chunk;
    last = min_of(first + rows_per_chunk, p.rows_per_image());
  }
  int64_t image, first, last;
};

inline int64_t num_chunks(const NormRows& p, int64_t rows_per_chunk) {
  return p.num_images() * ceil_div(p.rows_per_image(), rows_per_chunk);
}

// Source is made once per thread, from `op`. For every row `sum(image, row, term)` opens it and
// sums term(value) over its columns; then `values` holds it as Real.
template <typename T, typename Source, typename Op, typename Real = typename Stats<T>::type>
void norm_forward(const NormFwd& p, const Op& op, int num_threads) {
  const int64_t C = p.width();
#pragma omp parallel num_threads(num_threads)
  {
    Modulation<Real> modulation(p);
    Source rows(p, op);
    const Real *factor = modulation.factor, *offset = modulation.offset;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_chunks(p, kForwardChunk); ++item) {
      const Chunk chunk(p, item, kForwardChunk);
      if (!p.scale.per_row) modulation.read(chunk.image, 0);
      for (int64_t row = chunk.first; row < chunk.last; ++row) {
        if (p.scale.per_row) modulation.read(chunk.image, row);
        const int64_t dense_row = chunk.image * p.rows_per_image() + row;
        Real mean = 0, squares;
        if (p.is_layer_norm()) {
          mean = rows.sum(chunk.image, row, [](Real x) { return x; }) / Real(C);
          const Real* x = rows.values;
          // around the mean: the difference of two large sums would lose digits
          squares = sum_columns<Real>(C, [=](int64_t c) { return (x[c] - mean) * (x[c] - mean); });
          p.mean.as<Real>()[dense_row] = mean;
        } else {
          squares = rows.sum(chunk.image, row, [](Real x) { return x * x; });
        }
        const Real rstd = Real(1) / Real(__builtin_sqrt(squares / Real(C) + Real(p.eps)));
        p.rstd.as<Real>()[dense_row] = rstd;
        const Real* x = rows.values;
        T* y = p.y.as<T>() + dense_row * C;
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) {
          const Real n = math::normalise(x[c], mean, rstd);
          math::from_real(math::modulate(n, math::Affine<Real>{factor[c], offset[c]}), &y[c]);
        }
      }
    }
  }
}

// In place of a gradient that is None: one row of zeros, for all rows. False without memory.
inline bool fill_in(const View<3>& like, const Place& place, View<3>* grad) {
  if (grad->data != nullptr) return true;
  const int64_t C = like.size[2];
  double* zeros = place.scratch<double>(C);  // of all dtypes
  for (int64_t c = 0; zeros != nullptr && c < C; ++c) zeros[c] = 0;
  *grad = {zeros, {like.size[0], like.size[1], C}, {0, 0, 1}, like.dtype};
  return zeros != nullptr;
}

// Grads is made once per thread, from `op`. start_chunk(chunk) and finish_chunk(item, chunk) frame
// the rows of a chunk; for every row start_row(image, row) gives what takes (c, gradient of the
// norm's input), and finish_row(image, row) follows.
//
// The chunk's partial sums are of grad and of grad * n, where grad is grad_y, or grad_y * (1 +
// scale) when the modulation is per token (it cannot be taken out of the sum there).
template <typename T, typename Grads, typename Op, typename Real = typename Stats<T>::type>
void norm_backward_rows(const NormBwd& p, const Op& op, int num_threads) {
  const int64_t C = p.width();
  const Real inverse_width = Real(1) / Real(C);
#pragma omp parallel num_threads(num_threads)
  {
    Modulation<Real> modulation(p);
    Grads grads(p, op);
    Scratch<Real, 6> scratch(C);
    RowInput<Real, T> x_row{scratch.row(0), nullptr}, grad_row{scratch.row(1), nullptr};
    ColumnSums<Real> grad_sums(scratch.row(2), scratch.row(3), C);
    ColumnSums<Real> grad_n_sums(scratch.row(4), scratch.row(5), C);
    Real *sum_grad = grad_sums.block(), *sum_grad_n = grad_n_sums.block();
    const Real *weight = modulation.weight, *bias = modulation.bias, *scale = modulation.scale,
               *factor = modulation.factor;
    // in backward offset and shift are not needed: their rows take this row's grad_scale and
    // grad_shift
    Real *grad_scale = modulation.offset, *grad_shift = modulation.shift;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < num_chunks(p, p.rows_per_chunk); ++item) {
      const Chunk chunk(p, item, p.rows_per_chunk);
      const int64_t image = chunk.image;
      if (!p.scale.per_row) modulation.read(image, 0);
      grads.start_chunk(chunk);
      grad_sums.clear();
      grad_n_sums.clear();

      for (int64_t row = chunk.first; row < chunk.last; ++row) {
        if (p.scale.per_row) modulation.read(image, row);
        const int64_t dense_row = image * p.rows_per_image() + row;
        x_row.row = p.x.as<T>() + p.x.offset(image, row);
        grad_row.row = p.grad_y.as<T>() + p.grad_y.offset(image, row);
        const Real mean = p.is_layer_norm() ? p.mean.as<Real>()[dense_row] : Real(0);
        const Real rstd = p.rstd.as<Real>()[dense_row];

        const Real mean_grad_n_n = inverse_width * sum_columns<Real>(C, [=](int64_t c) {
                                     const Real n = math::normalise(x_row.first(c), mean, rstd);
                                     return grad_row.first(c) * factor[c] * n;
                                   });
        const Real *x = x_row.values(), *grad_y = grad_row.values();
        Real mean_grad_n = 0;
        if (p.is_layer_norm()) {
          mean_grad_n = inverse_width *
                        sum_columns<Real>(C, [=](int64_t c) { return grad_y[c] * factor[c]; });
        }

        const auto write = grads.start_row(image, row);
        if (!p.scale.per_row) {
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) {
            const Real n = math::normalise(x[c], mean, rstd);
            write(c, math::norm_grad_x(grad_y[c] * factor[c], n, rstd, mean_grad_n, mean_grad_n_n));
            sum_grad[c] += grad_y[c];
            sum_grad_n[c] += grad_y[c] * n;
          }
        } else {
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) {
            const Real n = math::normalise(x[c], mean, rstd);
            write(c, math::norm_grad_x(grad_y[c] * factor[c], n, rstd, mean_grad_n, mean_grad_n_n));
            const Real grad_m = grad_y[c] * (Real(1) + scale[c]);
            sum_grad[c] += grad_m;
            sum_grad_n[c] += grad_m * n;
            grad_shift[c] = grad_y[c];
            grad_scale[c] =
                math::modulation_grad_scale(grad_y[c], grad_y[c] * n, weight[c], bias[c]);
          }
          store_row(grad_shift, p.grad_shift, dense_row * C, C);
          store_row(grad_scale, p.grad_scale, dense_row * C, C);
        }
        grad_sums.end_row();
        grad_n_sums.end_row();
        grads.finish_row(image, row);
      }
      if (p.partials != nullptr) {
        Real* partials = static_cast<Real*>(p.partials) + item * 2 * C;
        store_row(grad_sums.total(), partials, C);
        store_row(grad_n_sums.total(), partials + C, C);
      }
      grads.finish_chunk(item);
    }
  }
}

// Adds n columns of the partial sums of the chunks of one image, in order; `stride` apart. In fp64:
// these are few numbers.
template <typename Real>
inline void add_chunks(const Real* partials, int64_t chunks, int64_t stride, double* sum,
                       int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < n; ++i) sum[i] += partials[chunk * stride + i];
  }
}

// Gradients of shift, scale, weight and bias from the partial sums. One work item is a block of
// columns.
template <typename Real>
void norm_backward_sums(const NormBwd& p, int num_threads) {
  if (p.partials == nullptr) return;
  const int64_t C = p.width();
  const int64_t chunks_per_image = ceil_div(p.rows_per_image(), p.rows_per_chunk);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < ceil_div(C, kColumnsPerItem); ++item) {
    const int64_t begin = item * kColumnsPerItem;
    const int64_t n = min_of(kColumnsPerItem, C - begin);
    double weight[kColumnsPerItem], bias[kColumnsPerItem], scale[kColumnsPerItem] = {};
    double grad_weight[kColumnsPerItem] = {}, grad_bias[kColumnsPerItem] = {};
    load_row(p.weight, begin, 1.0, weight, n);
    load_row(p.bias, begin, 0.0, bias, n);
    for (int64_t image = 0; image < p.num_images(); ++image) {
      double sum_grad[kColumnsPerItem], sum_grad_n[kColumnsPerItem];
      const Real* partials =
          static_cast<const Real*>(p.partials) + image * chunks_per_image * 2 * C + begin;
      add_chunks(partials, chunks_per_image, 2 * C, sum_grad, n);
      add_chunks(partials + C, chunks_per_image, 2 * C, sum_grad_n, n);
      if (p.has_shared_modulation()) {
        load_row(p.scale, p.scale.row(image, 0) + begin, 0.0, scale, n);
      }
      for (int64_t i = 0; i < n; ++i) {
        grad_bias[i] += (1.0 + scale[i]) * sum_grad[i];
        grad_weight[i] += (1.0 + scale[i]) * sum_grad_n[i];
      }
      if (p.has_shared_modulation()) {
        double grad_scale[kColumnsPerItem];
        for (int64_t i = 0; i < n; ++i) {
          grad_scale[i] =
              math::modulation_grad_scale(sum_grad[i], sum_grad_n[i], weight[i], bias[i]);
        }
        store_row(sum_grad, p.grad_shift, image * C + begin, n);
        store_row(grad_scale, p.grad_scale, image * C + begin, n);
      }
    }
    if (p.weight.data != nullptr) store_row(grad_weight, p.grad_weight, begin, n);
    if (p.bias.data != nullptr) store_row(grad_bias, p.grad_bias, begin, n);
  }
}

}  // namespace
}  // namespace pixelgen::cpu::PIXELGEN_ISA
