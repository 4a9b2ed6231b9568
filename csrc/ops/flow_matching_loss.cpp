// Bound by bytes: x_pred and x are read once (backward: and grad_x_pred written once). One work
// item is a chunk of one sample's elements, so the work is shared evenly whatever B, T and D are.
#include "flow_matching_loss.h"

#include "../common/chunks.h"
#include "../math/flow.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// Elements that are converted at a time: their buffers stay in the first-level cache.
constexpr int64_t kBlock = 1024;

Chunks chunks_of(const FlowMatchingLoss& a) {
  constexpr int64_t kLength = 16384;  // what fills an even share of the cores
  return {a.x_pred.size[0], a.size(), kLength, 1};
}

// Calls fn(x_pred, x, first, n) with the elements [first, first + n) of sample b, block by block,
// for those from `begin` to before `end`. A block lies within one token.
template <typename Real, typename Fn>
inline void for_blocks(const FlowMatchingLoss& a, int64_t b, int64_t begin, int64_t end, Fn fn) {
  const int64_t D = a.x_pred.size[2];
  alignas(64) Real x_pred_buffer[kBlock], x_buffer[kBlock];
  for (int64_t first = begin; first < end;) {
    const int64_t token = first / D, d = first % D;
    const int64_t n = min_of(min_of(D - d, end - first), kBlock);
    fn(as_real(a.x_pred, 2, x_pred_buffer, n, b, token, d),
       as_real(a.x, 2, x_buffer, n, b, token, d), first, n);
    first += n;
  }
}

template <typename Real>
inline double weight_of(const FlowMatchingLoss& a, int64_t b) {
  return math::velocity_weight(double(number<Real>(a.t, b)), a.t_eps);
}

template <typename Real>
Status forward(FlowMatchingLossFwd a, const Place& place) {
  a.join_tokens();
  const auto sum_of = [&](int64_t b, int64_t begin, int64_t end) {
    double sum = 0;  // of the blocks' sums
    for_blocks<Real>(a, b, begin, end, [&](const Real* x_pred, const Real* x, int64_t, int64_t n) {
      sum +=
          sum_columns<Real>(n, [&](int64_t i) { return (x_pred[i] - x[i]) * (x_pred[i] - x[i]); });
    });
    return sum;
  };
  return chunk_means<Real>(a.loss, chunks_of(a), place, sum_of,
                           [&](int64_t b) { return weight_of<Real>(a, b); });
}

template <typename Real>
Status backward(FlowMatchingLossBwd g, const Place& place) {
  g.join_tokens();
  const int64_t size = g.size();
  for_chunks(chunks_of(g), place, [&](int64_t b, int64_t begin, int64_t end) {
    const double grad_loss = number<Real>(g.grad_loss, b);
    const Real factor = Real(grad_loss * weight_of<Real>(g, b) * 2.0 / double(size));
    with_element_type(g.x_pred.dtype, [&](auto element) {
      using T = decltype(element);
      T* grad = g.grad_x_pred.as<T>() + b * size;
      for_blocks<Real>(g, b, begin, end,
                       [&](const Real* x_pred, const Real* x, int64_t first, int64_t n) {
                         T* __restrict out = grad + first;
#pragma omp simd
                         for (int64_t i = 0; i < n; ++i)
                           math::from_real((x_pred[i] - x[i]) * factor, &out[i]);
                       });
    });
  });
  return nullptr;
}

}  // namespace

Status flow_matching_loss_fwd(const FlowMatchingLossFwd& a, const Place& place) {
  return checked(a, [&](auto real) { return forward<decltype(real)>(a, place); });
}

Status flow_matching_loss_bwd(const FlowMatchingLossBwd& g, const Place& place) {
  return checked(g, [&](auto real) { return backward<decltype(real)>(g, place); });
}

PIXELGEN_OPS(flow_matching_loss, PIXELGEN_OP(flow_matching_loss_fwd),
             PIXELGEN_OP(flow_matching_loss_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
