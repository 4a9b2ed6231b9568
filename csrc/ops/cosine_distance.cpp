// Bound by bytes: pred and target are read once (backward: and each wanted gradient written once).
// One work item is a chunk of one sample's tokens.
#include "cosine_distance.h"

#include "../common/chunks.h"
#include "../math/distance.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// Elements that are converted at a time: their buffers stay in the first-level cache.
constexpr int64_t kBlock = 1024;

// Calls fn(pred, target, d, n) with the elements [d, d + n) of a token.
template <typename Real, typename Fn>
inline void for_blocks(const CosineDistance& a, int64_t b, int64_t token, Fn fn) {
  alignas(64) Real pred_buffer[kBlock], target_buffer[kBlock];
  for (int64_t d = 0; d < a.pred.size[2]; d += kBlock) {
    const int64_t n = min_of(a.pred.size[2] - d, kBlock);
    fn(as_real(a.pred, 2, pred_buffer, n, b, token, d),
       as_real(a.target, 2, target_buffer, n, b, token, d), d, n);
  }
}

inline double max_of(double a, double b) { return a < b ? b : a; }  // NaN stays in a

// 1 - cosine of a token; its statistics go to `statistics`, three rows of T. The sums are double:
// where pred and target are parallel, all digits of the cosine cancel.
template <typename Real>
double token_distance(const CosineDistance& a, int64_t b, int64_t token) {
  double pred_square = 0, target_square = 0, product = 0;
  for_blocks<Real>(a, b, token, [&](const Real* u, const Real* v, int64_t, int64_t n) {
    double u_square = 0, v_square = 0, u_v = 0;
#pragma omp simd reduction(+ : u_square, v_square, u_v)
    for (int64_t d = 0; d < n; ++d) {
      const double p_value = u[d], q_value = v[d];
      u_square += p_value * p_value;
      v_square += q_value * q_value;
      u_v += p_value * q_value;
    }
    pred_square += u_square;
    target_square += v_square;
    product += u_v;
  });
  const double pred_norm = __builtin_sqrt(pred_square), target_norm = __builtin_sqrt(target_square);
  const double cosine = pred_norm == 0 || target_norm == 0
                            ? product
                            : product / max_of(pred_norm, a.eps) / max_of(target_norm, a.eps);
  const int64_t T = a.pred.size[1];
  Real* statistics = a.statistics.as<Real>() + 3 * T * b + token;
  statistics[0] = Real(pred_norm);
  statistics[T] = Real(target_norm);
  statistics[2 * T] = Real(cosine);
  return 1 - cosine;
}

template <typename Real>
Status forward(const CosineDistanceFwd& a, const Place& place) {
  constexpr int64_t kLength = 16;  // what fills an even share of the cores
  const auto sum_of = [&](int64_t b, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t token = begin; token < end; ++token) sum += token_distance<Real>(a, b, token);
    return sum;
  };
  const Chunks chunks{a.pred.size[0], a.pred.size[1], kLength, a.pred.size[2]};
  return chunk_means<Real>(a.distance, chunks, place, sum_of);
}

// The gradient of u's vector, n elements.
template <typename Real>
inline void store_grads(const Real* u, const Real* v, math::CosineFactors<Real> factors,
                        const Dense& out, int64_t offset, int64_t n) {
  if (out.data == nullptr) return;  // not wanted
  with_element_type(out.dtype, [&](auto element) {
    using T = decltype(element);
    T* __restrict grad = out.as<T>() + offset;
#pragma omp simd
    for (int64_t d = 0; d < n; ++d)
      math::from_real(math::cosine_grad(u[d], v[d], factors), &grad[d]);
  });
}

template <typename Real>
Status backward(const CosineDistanceBwd& g, const Place& place) {
  const int64_t B = g.pred.size[0], T = g.pred.size[1], D = g.pred.size[2];
  for_chunks({B, T, 1, D}, place, [&](int64_t b, int64_t token, int64_t) {
    const Real* statistics = g.statistics.as<Real>() + 3 * T * b + token;
    const Real pred_norm = statistics[0], target_norm = statistics[T], cosine = statistics[2 * T];
    const double grad = number<Real>(g.grad_distance, b);
    const Real factor = Real(grad / double(T)), eps = Real(g.eps);
    const auto of_pred = math::cosine_factors(pred_norm, target_norm, cosine, eps, factor);
    const auto of_target = math::cosine_factors(target_norm, pred_norm, cosine, eps, factor);
    for_blocks<Real>(g, b, token, [&](const Real* u, const Real* v, int64_t d, int64_t n) {
      const int64_t offset = (b * T + token) * D + d;
      store_grads(u, v, of_pred, g.grad_pred, offset, n);
      store_grads(v, u, of_target, g.grad_target, offset, n);
    });
  });
  return nullptr;
}

}  // namespace

Status cosine_distance_fwd(const CosineDistanceFwd& a, const Place& place) {
  return checked(a, [&](auto real) { return forward<decltype(real)>(a, place); });
}

Status cosine_distance_bwd(const CosineDistanceBwd& g, const Place& place) {
  return checked(g, [&](auto real) { return backward<decltype(real)>(g, place); });
}

PIXELGEN_OPS(cosine_distance, PIXELGEN_OP(cosine_distance_fwd), PIXELGEN_OP(cosine_distance_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
