// Bound by bytes: x_pred and x are read once (backward: and grad_x_pred written once). One work
// item is a chunk of one sample's elements, so the work is shared evenly whatever B, T and D are.
#include "../flow_matching_loss.h"

#include "../math/flow.h"
#include "strided.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// Elements that are converted at a time: their buffers stay in the first-level cache.
constexpr int64_t kBlock = 1024;

// Calls fn(x_pred, x, first, n) with the elements [first, first + n) of sample b, block by block,
// for those from `begin` to before `end`. A block lies within one token.
template <typename Real, typename Fn>
inline void for_blocks(const FlowMatchingLossParams& p, int64_t b, int64_t begin, int64_t end,
                       Fn fn) {
  alignas(64) Real x_pred_buffer[kBlock], x_buffer[kBlock];
  for (int64_t first = begin; first < end;) {
    const int64_t token = first / p.D, d = first % p.D;
    const int64_t n = min_of(min_of(p.D - d, end - first), kBlock);
    const int64_t x_pred_offset =
        b * p.x_pred_stride_b + token * p.x_pred_stride_t + d * p.x_pred_stride_d;
    const int64_t x_offset = b * p.x_stride_b + token * p.x_stride_t + d * p.x_stride_d;
    fn(as_real(p.x_pred, p.x_pred_dtype, x_pred_offset, p.x_pred_stride_d, x_pred_buffer, n),
       as_real(p.x, p.x_dtype, x_offset, p.x_stride_d, x_buffer, n), first, n);
    first += n;
  }
}

template <typename Real>
void forward(const FlowMatchingLossParams& p, int num_threads) {
  const int64_t size = p.T * p.D, chunks = ceil_div(size, p.elements_per_chunk);
  Real* partials = static_cast<Real*>(p.partials);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < p.B * chunks; ++item) {
    const int64_t b = item / chunks, begin = item % chunks * p.elements_per_chunk;
    double sum = 0;  // of the blocks' sums
    for_blocks<Real>(p, b, begin, min_of(begin + p.elements_per_chunk, size),
                     [&](const Real* x_pred, const Real* x, int64_t, int64_t n) {
                       sum += sum_columns<Real>(
                           n, [&](int64_t i) { return (x_pred[i] - x[i]) * (x_pred[i] - x[i]); });
                     });
    partials[item] = Real(sum);
  }
  for (int64_t b = 0; b < p.B; ++b) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[b * chunks + chunk];
    const double t = number<Real>(p.t, p.t_dtype, b * p.t_stride);
    static_cast<Real*>(p.loss)[b] = Real(sum / double(size) * math::velocity_weight(t, p.t_eps));
  }
}

template <typename T, typename Real>
void backward(const FlowMatchingLossGradParams& g, int num_threads) {
  const FlowMatchingLossParams& p = g.forward;
  const int64_t size = p.T * p.D, chunks = ceil_div(size, p.elements_per_chunk);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < p.B * chunks; ++item) {
    const int64_t b = item / chunks, begin = item % chunks * p.elements_per_chunk;
    const double t = number<Real>(p.t, p.t_dtype, b * p.t_stride);
    const double grad_loss = number<Real>(g.grad_loss, g.grad_loss_dtype, b * g.grad_loss_stride);
    const Real factor = Real(grad_loss * math::velocity_weight(t, p.t_eps) * 2.0 / double(size));
    T* grad = static_cast<T*>(g.grad_x_pred) + b * size;
    for_blocks<Real>(p, b, begin, min_of(begin + p.elements_per_chunk, size),
                     [&](const Real* x_pred, const Real* x, int64_t first, int64_t n) {
                       T* __restrict out = grad + first;
#pragma omp simd
                       for (int64_t i = 0; i < n; ++i)
                         math::from_real((x_pred[i] - x[i]) * factor, &out[i]);
                     });
  }
}

}  // namespace

Status flow_matching_loss_fwd(const FlowMatchingLossParams& p, int num_threads) {
  if (p.x_pred_dtype == DType::kFloat64 || p.x_dtype == DType::kFloat64)
    forward<double>(p, num_threads);
  else
    forward<float>(p, num_threads);
  return nullptr;
}

Status flow_matching_loss_bwd(const FlowMatchingLossGradParams& g, int num_threads) {
  with_element_type(g.forward.x_pred_dtype, [&](auto element) {
    using T = decltype(element);
    if (g.forward.x_dtype == DType::kFloat64)
      backward<T, double>(g, num_threads);
    else
      backward<T, typename Stats<T>::type>(g, num_threads);
  });
  return nullptr;
}

}  // namespace pixelgen::cpu::PIXELGEN_ISA
