// Bound by bytes: pred and target are read once (backward: and each wanted gradient written once).
// One work item is a chunk of one sample's tokens.
#include "../cosine_distance.h"

#include "../math/distance.h"
#include "strided.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

using math::Divisor;

// Elements that are converted at a time: their buffers stay in the first-level cache.
constexpr int64_t kBlock = 1024;
// Elements that take less time than waking a thread.
constexpr int64_t kAlone = 32768;

// Calls fn(pred, target, d, n) with the elements [d, d + n) of a token.
template <typename Real, typename Fn>
inline void for_blocks(const CosineDistanceParams& p, int64_t b, int64_t token, Fn fn) {
  alignas(64) Real pred_buffer[kBlock], target_buffer[kBlock];
  const int64_t pred_offset = b * p.pred_stride_b + token * p.pred_stride_t;
  const int64_t target_offset = b * p.target_stride_b + token * p.target_stride_t;
  for (int64_t d = 0; d < p.D; d += kBlock) {
    const int64_t n = min_of(p.D - d, kBlock);
    fn(as_real(p.pred, p.pred_dtype, pred_offset + d * p.pred_stride_d, p.pred_stride_d,
               pred_buffer, n),
       as_real(p.target, p.target_dtype, target_offset + d * p.target_stride_d, p.target_stride_d,
               target_buffer, n),
       d, n);
  }
}

inline double max_of(double a, double b) { return a < b ? b : a; }  // NaN stays in a

// 1 - cosine of a token; its statistics go to `statistics`, three rows of T. The sums are double:
// where pred and target are parallel, all digits of the cosine cancel.
template <typename Real>
double token_distance(const CosineDistanceParams& p, int64_t b, int64_t token, Real* statistics) {
  double pred_square = 0, target_square = 0, product = 0;
  for_blocks<Real>(p, b, token, [&](const Real* u, const Real* v, int64_t, int64_t n) {
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
                            : product / max_of(pred_norm, p.eps) / max_of(target_norm, p.eps);
  statistics[token] = Real(pred_norm);
  statistics[p.T + token] = Real(target_norm);
  statistics[2 * p.T + token] = Real(cosine);
  return 1 - cosine;
}

template <typename Real>
void forward(const CosineDistanceParams& p, int num_threads) {
  const int64_t chunks = ceil_div(p.T, p.tokens_per_chunk);
  Real* partials = static_cast<Real*>(p.partials);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (p.B * p.T * p.D > kAlone)
  for (int64_t item = 0; item < p.B * chunks; ++item) {
    const int64_t b = item / chunks, begin = item % chunks * p.tokens_per_chunk;
    const int64_t end = min_of(begin + p.tokens_per_chunk, p.T);
    Real* statistics = static_cast<Real*>(p.statistics) + 3 * p.T * b;
    double sum = 0;
    for (int64_t token = begin; token < end; ++token)
      sum += token_distance(p, b, token, statistics);
    partials[item] = Real(sum);
  }
  for (int64_t b = 0; b < p.B; ++b) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[b * chunks + chunk];
    static_cast<Real*>(p.distance)[b] = Real(sum / double(p.T));
  }
}

// The gradient of u's vector, n elements.
template <typename Real>
inline void store_grads(const Real* u, const Real* v, math::CosineFactors<Real> factors, void* out,
                        DType dtype, int64_t offset, int64_t n) {
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    T* __restrict grad = static_cast<T*>(out) + offset;
#pragma omp simd
    for (int64_t d = 0; d < n; ++d)
      math::from_real(math::cosine_grad(u[d], v[d], factors), &grad[d]);
  });
}

template <typename Real>
void backward(const CosineDistanceGradParams& g, int num_threads) {
  const CosineDistanceParams& p = g.forward;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (p.B * p.T * p.D > kAlone)
  for (int64_t item = 0; item < p.B * p.T; ++item) {
    const int64_t b = item / p.T, token = item % p.T;
    const Real* statistics = static_cast<const Real*>(p.statistics) + 3 * p.T * b + token;
    const Real pred_norm = statistics[0], target_norm = statistics[p.T];
    const Real cosine = statistics[2 * p.T];
    const double grad =
        number<Real>(g.grad_distance, g.grad_distance_dtype, b * g.grad_distance_stride);
    const Real factor = Real(grad / double(p.T)), eps = Real(p.eps);
    const auto of_pred = math::cosine_factors(pred_norm, target_norm, cosine, eps, factor);
    const auto of_target = math::cosine_factors(target_norm, pred_norm, cosine, eps, factor);
    for_blocks<Real>(p, b, token, [&](const Real* u, const Real* v, int64_t d, int64_t n) {
      const int64_t offset = item * p.D + d;
      if (g.grad_pred != nullptr) store_grads(u, v, of_pred, g.grad_pred, p.pred_dtype, offset, n);
      if (g.grad_target != nullptr)
        store_grads(v, u, of_target, g.grad_target, p.target_dtype, offset, n);
    });
  }
}

}  // namespace

Status cosine_distance_fwd(const CosineDistanceParams& p, int num_threads) {
  if (p.pred_dtype == DType::kFloat64 || p.target_dtype == DType::kFloat64)
    forward<double>(p, num_threads);
  else
    forward<float>(p, num_threads);
  return nullptr;
}

Status cosine_distance_bwd(const CosineDistanceGradParams& g, int num_threads) {
  if (g.forward.pred_dtype == DType::kFloat64 || g.forward.target_dtype == DType::kFloat64)
    backward<double>(g, num_threads);
  else
    backward<float>(g, num_threads);
  return nullptr;
}

}  // namespace pixelgen::cpu::PIXELGEN_ISA
