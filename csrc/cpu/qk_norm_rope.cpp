// Bound by bytes: every number is read once and written once. One work item is a token (backward: a
// chunk of tokens) with all of its heads; cosines and sines are loaded once per token.
#include "../qk_norm_rope.h"

#include <cstring>

#include "../math/norm.h"
#include "../math/rope.h"
#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// kD: head dimension where it is known at compile time, else 0. The loops over a head are then a
// few vector instructions without a remainder.

// Weights, and the angles of one token as math/rope.h takes them.
template <typename Real>
struct Tables {
  alignas(64) Real weight[2][kMaxHeadDim];  // of q, of k
  alignas(64) Real cos[kMaxHeadDim];
  alignas(64) Real signed_sin[kMaxHeadDim];

  explicit Tables(const QkNormRopeParams& p) {
    load_row(p.q_weight, p.q_weight_dtype, 0, Real(1), weight[0], p.D);
    load_row(p.k_weight, p.k_weight_dtype, 0, Real(1), weight[1], p.D);
  }

  // Whether this token is rotated at all.
  bool load_angles(const QkNormRopeParams& p, int64_t token) {
    if (p.cos == nullptr || token < p.num_prefix_tokens) return false;
    const int64_t pairs = p.D / 2, offset = (token - p.num_prefix_tokens) * pairs;
    Real pair_cos[kMaxHeadDim / 2], pair_sin[kMaxHeadDim / 2];
    load_row(p.cos, p.cos_dtype, offset, Real(1), pair_cos, pairs);
    load_row(p.sin, p.sin_dtype, offset, Real(0), pair_sin, pairs);
    for (int64_t i = 0; i < pairs; ++i) {
      cos[2 * i] = cos[2 * i + 1] = pair_cos[i];
      signed_sin[2 * i] = -pair_sin[i];
      signed_sin[2 * i + 1] = pair_sin[i];
    }
    return true;
  }
};

// The other channel of every pair.
template <typename Real>
inline void swap_pairs(const Real* row, Real* swapped, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D / 2; ++i) {
    swapped[2 * i] = row[2 * i + 1];
    swapped[2 * i + 1] = row[2 * i];
  }
}

template <typename Real, typename Term>
inline Real sum_head(int64_t D, Term term) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += term(d);
  return sum;
}

template <typename Real>
inline Real head_rstd(const Real* u, int64_t D, double eps) {
  const Real squares = sum_head<Real>(D, [&](int64_t d) { return u[d] * u[d]; });
  return Real(1) / Real(__builtin_sqrt(squares / Real(D) + Real(eps)));
}

template <typename T, int kD, typename Real = typename Stats<T>::type>
void forward(const QkNormRopeParams& p, int num_threads) {
  const int64_t D = kD > 0 ? kD : p.D;
#pragma omp parallel num_threads(num_threads)
  {
    Tables<Real> tables(p);
    alignas(64) Real buffer[kMaxHeadDim], normed[kMaxHeadDim], swapped[kMaxHeadDim],
        rotated[kMaxHeadDim];
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p.B * p.T; ++item) {
      const int64_t b = item / p.T, t = item % p.T;
      const T* packed =
          static_cast<const T*>(p.qkv) + b * p.qkv_batch_stride + t * p.qkv_token_stride;
      const int64_t first = (b * p.N * p.T + t) * D;  // of head 0 in q, k and v
      const bool is_rotated = tables.load_angles(p, t);
      for (int which = 0; which < 2; ++which) {
        const Real* weight = tables.weight[which];
        T* out = static_cast<T*>(which == 0 ? p.q : p.k) + first;
        for (int64_t head = 0; head < p.N; ++head) {
          const Real* u = as_real(packed + (which * p.N + head) * D, buffer, D);
          const Real rstd = head_rstd(u, D, p.eps);
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) normed[d] = u[d] * rstd * weight[d];
          Real* result = real_target(out + head * p.T * D, rotated);
          if (is_rotated) {
            swap_pairs(normed, swapped, D);
#pragma omp simd
            for (int64_t d = 0; d < D; ++d)
              result[d] = math::rotate(normed[d], swapped[d], tables.cos[d], tables.signed_sin[d]);
            finish_row(result, out + head * p.T * D, D);
          } else {
            store_row(normed, out + head * p.T * D, D);
          }
        }
      }
      for (int64_t head = 0; head < p.N; ++head) {
        std::memcpy(static_cast<T*>(p.v) + first + head * p.T * D, packed + (2 * p.N + head) * D,
                    D * sizeof(T));
      }
    }
  }
}

// With g = grad_q (or grad_k) rotated back and n = u * rstd: grad_u is that of the norm for the
// gradient g * weight, and g * n adds to the gradient of weight.
template <typename T, int kD, typename Real = typename Stats<T>::type>
void backward_tokens(const QkNormRopeGradParams& g, int num_threads) {
  const QkNormRopeParams& p = g.forward;
  const int64_t D = kD > 0 ? kD : p.D;
  const Real inverse_width = Real(1) / Real(D);
#pragma omp parallel num_threads(num_threads)
  {
    Tables<Real> tables(p);
    alignas(64) Real u_buffer[kMaxHeadDim], grad_buffer[kMaxHeadDim], swapped[kMaxHeadDim],
        turned[kMaxHeadDim], grad_u_buffer[kMaxHeadDim];
    // in two levels: the rounding errors of one long sum grow with its length
    alignas(64) Real sum_grad_n[2][kMaxHeadDim], sum_of_token[kMaxHeadDim];
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < ceil_div(p.B * p.T, g.tokens_per_chunk); ++chunk) {
      const int64_t begin = chunk * g.tokens_per_chunk;
      const int64_t end = min_of(begin + g.tokens_per_chunk, p.B * p.T);
      for (int64_t d = 0; d < D; ++d) sum_grad_n[0][d] = sum_grad_n[1][d] = 0;

      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / p.T, t = item % p.T;
        const T* packed =
            static_cast<const T*>(p.qkv) + b * p.qkv_batch_stride + t * p.qkv_token_stride;
        T* grad_packed = static_cast<T*>(g.grad_qkv) + item * 3 * p.N * D;
        const bool is_rotated = tables.load_angles(p, t);
        for (int which = 0; which < 2; ++which) {
          const Real* weight = tables.weight[which];
          const HeadsStrides& strides = which == 0 ? g.grad_q_strides : g.grad_k_strides;
          const T* grad_out = static_cast<const T*>(which == 0 ? g.grad_q : g.grad_k) +
                              b * strides.batch + t * strides.token;
          for (int64_t d = 0; d < D; ++d) sum_of_token[d] = 0;
          for (int64_t head = 0; head < p.N; ++head) {
            const Real* u = as_real(packed + (which * p.N + head) * D, u_buffer, D);
            const Real* grad = as_real(grad_out + head * strides.head, grad_buffer, D);
            if (is_rotated) {
              swap_pairs(grad, swapped, D);
#pragma omp simd
              for (int64_t d = 0; d < D; ++d)
                turned[d] =
                    math::rotate_back(grad[d], swapped[d], tables.cos[d], tables.signed_sin[d]);
              grad = turned;
            }
            const Real rstd = head_rstd(u, D, p.eps);
            const Real mean_grad_n_n = inverse_width * sum_head<Real>(D, [&](int64_t d) {
                                         return grad[d] * weight[d] * (u[d] * rstd);
                                       });
            Real* grad_u = real_target(grad_packed + (which * p.N + head) * D, grad_u_buffer);
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              const Real n = u[d] * rstd;
              grad_u[d] = math::norm_grad_x(grad[d] * weight[d], n, rstd, Real(0), mean_grad_n_n);
              sum_of_token[d] += grad[d] * n;
            }
            finish_row(grad_u, grad_packed + (which * p.N + head) * D, D);
          }
          for (int64_t d = 0; d < D; ++d) sum_grad_n[which][d] += sum_of_token[d];
        }
        const T* grad_v = static_cast<const T*>(g.grad_v) + b * g.grad_v_strides.batch +
                          t * g.grad_v_strides.token;
        for (int64_t head = 0; head < p.N; ++head) {
          std::memcpy(grad_packed + (2 * p.N + head) * D, grad_v + head * g.grad_v_strides.head,
                      D * sizeof(T));
        }
      }
      Real* partials = static_cast<Real*>(g.partials) + chunk * 2 * D;
      store_row(sum_grad_n[0], partials, D);
      store_row(sum_grad_n[1], partials + D, D);
    }
  }
}

// Adds up the partial sums, always in the same order; few numbers, so one thread does it, in fp64.
template <typename Real>
void backward_sums(const QkNormRopeGradParams& g) {
  const QkNormRopeParams& p = g.forward;
  double sums[2 * kMaxHeadDim] = {};
  for (int64_t chunk = 0; chunk < ceil_div(p.B * p.T, g.tokens_per_chunk); ++chunk) {
    const Real* partials = static_cast<const Real*>(g.partials) + chunk * 2 * p.D;
    for (int64_t i = 0; i < 2 * p.D; ++i) sums[i] += double(partials[i]);
  }
  store_row(sums, g.grad_q_weight, p.q_weight_dtype, 0, p.D);
  store_row(sums + p.D, g.grad_k_weight, p.k_weight_dtype, 0, p.D);
}

const char* problem(const QkNormRopeParams& p) {
  return p.D < 1 || p.D > kMaxHeadDim ? "D must be between 1 and 256" : nullptr;
}

}  // namespace

Status qk_norm_rope_fwd(const QkNormRopeParams& p, int num_threads) {
  if (const char* text = problem(p)) return text;
  with_element_type(p.qkv_dtype, [&](auto element) {
    using T = decltype(element);
    switch (p.D) {
      case 16:
        return forward<T, 16>(p, num_threads);
      case 64:
        return forward<T, 64>(p, num_threads);
      default:
        return forward<T, 0>(p, num_threads);
    }
  });
  return nullptr;
}

Status qk_norm_rope_bwd(const QkNormRopeGradParams& g, int num_threads) {
  if (const char* text = problem(g.forward)) return text;
  with_element_type(g.forward.qkv_dtype, [&](auto element) {
    using T = decltype(element);
    switch (g.forward.D) {
      case 16:
        backward_tokens<T, 16>(g, num_threads);
        break;
      case 64:
        backward_tokens<T, 64>(g, num_threads);
        break;
      default:
        backward_tokens<T, 0>(g, num_threads);
    }
    backward_sums<typename Stats<T>::type>(g);
  });
  return nullptr;
}

}  // namespace pixelgen::cpu::PIXELGEN_ISA
