// q = rotate(rms_norm(q) * q_weight), k = rotate(rms_norm(k) * k_weight), v = v, from a packed
// projection to the layout of attention. Arithmetic in fp32 (fp64 for fp64 qkv). Bound by bytes:
// every number is read once and written once. One work item is a token (backward: a chunk of
// tokens) with all of its heads; cosines and sines are loaded once per token.
#include <cstring>

#include "../common/rows.h"
#include "../math/norm.h"
#include "../math/rope.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

struct QkNormRope {
  Rows<> qkv;                    // (B, T, 3 N D), packed as (3, N, D)
  Tensor<1> q_weight, k_weight;  // (D,)
  Optional<2> cos, sin;          // (T - num_prefix_tokens, D / 2), or both none for no rotation
  int64_t num_heads;             // N
  int64_t num_prefix_tokens;     // at the front, not rotated
  double eps;
};

struct QkNormRopeFwd : QkNormRope {
  Dense q, k, v;  // (B, N, T, D)
  PIXELGEN_ARGUMENTS(qkv, q_weight, k_weight, cos, sin, q, k, v, num_heads, num_prefix_tokens, eps)
};

struct QkNormRopeBwd : QkNormRope {
  Optional<4> grad_q, grad_k, grad_v;  // as q, the last dimension contiguous; or none: zeros
  Dense grad_qkv, grad_q_weight, grad_k_weight;  // as what they are the gradients of
  PIXELGEN_ARGUMENTS(grad_q, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, grad_qkv,
                     grad_q_weight, grad_k_weight, num_heads, num_prefix_tokens, eps)
};

constexpr int64_t kMaxHeadDim = 256;

// The weights' gradients go through one partial sum per chunk of the B * T tokens and a second
// pass, so their bits depend on this number alone and not on how many threads run.
constexpr int64_t kTokensPerChunk = 16;

int64_t head_dim(const QkNormRope& p) {
  return p.num_heads > 0 ? p.qkv.size[2] / 3 / p.num_heads : 0;
}

// Weights, and the angles of one token as math/rope.h takes them.
template <typename Real>
struct Tables {
  alignas(64) Real weight[2][kMaxHeadDim];  // of q, of k
  alignas(64) Real cos[kMaxHeadDim];
  alignas(64) Real signed_sin[kMaxHeadDim];

  // Always inlined: GCC 12 adds up the squares of a head in another order where it is not.
  PIXELGEN_MEMBER explicit Tables(const QkNormRope& p) {
    const int64_t D = head_dim(p);
    load(p.q_weight, 0, weight[0], D);
    load(p.k_weight, 0, weight[1], D);
  }

  // Whether this token is rotated at all.
  bool load_angles(const QkNormRope& p, int64_t token) {
    if (p.cos.data == nullptr || token < p.num_prefix_tokens) return false;
    const int64_t D = head_dim(p);
    Real pair_cos[kMaxHeadDim / 2], pair_sin[kMaxHeadDim / 2];
    load(p.cos, p.cos.offset(token - p.num_prefix_tokens), pair_cos, D / 2);
    load(p.sin, p.sin.offset(token - p.num_prefix_tokens), pair_sin, D / 2);
    for (int64_t i = 0; i < D / 2; ++i) {
      cos[2 * i] = cos[2 * i + 1] = pair_cos[i];
      signed_sin[2 * i] = -pair_sin[i];
      signed_sin[2 * i + 1] = pair_sin[i];
    }
    return true;
  }

  // n elements of the last dimension.
  template <int kRank>
  static void load(const View<kRank>& from, int64_t offset, Real* out, int64_t n) {
    const int64_t stride = from.stride[kRank - 1];
    if (stride == 1) return load_row(from.data, from.dtype, offset, Real(0), out, n);
    for (int64_t i = 0; i < n; ++i)
      load_row(from.data, from.dtype, offset + i * stride, Real(0), &out[i], 1);
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

// kD: head dimension where it is known at compile time, else 0. The loops over a head are then a
// few vector instructions without a remainder.

template <typename T, int kD, typename Real = typename Stats<T>::type>
void forward(const QkNormRopeFwd& p, int num_threads) {
  const int64_t B = p.qkv.size[0], tokens = p.qkv.size[1], N = p.num_heads;
  const int64_t D = kD > 0 ? kD : head_dim(p);
#pragma omp parallel num_threads(num_threads)
  {
    Tables<Real> tables(p);
    alignas(64) Real buffer[kMaxHeadDim], normed[kMaxHeadDim], swapped[kMaxHeadDim],
        rotated[kMaxHeadDim];
#pragma omp for schedule(static)
    for (int64_t item = 0; item < B * tokens; ++item) {
      const int64_t b = item / tokens, t = item % tokens;
      const T* packed = p.qkv.as<T>() + p.qkv.offset(b, t);
      const int64_t first = (b * N * tokens + t) * D;  // of head 0 in q, k and v
      const bool is_rotated = tables.load_angles(p, t);
      for (int which = 0; which < 2; ++which) {
        const Real* weight = tables.weight[which];
        for (int64_t head = 0; head < N; ++head) {
          T* out = (which == 0 ? p.q : p.k).template as<T>() + first + head * tokens * D;
          const Real* u = as_real(packed + (which * N + head) * D, buffer, D);
          const Real rstd = head_rstd(u, D, p.eps);
#pragma omp simd
          for (int64_t d = 0; d < D; ++d) normed[d] = u[d] * rstd * weight[d];
          if (!is_rotated) {
            store_row(normed, out, D);
            continue;
          }
          Real* result = real_target(out, rotated);
          swap_pairs(normed, swapped, D);
#pragma omp simd
          for (int64_t d = 0; d < D; ++d)
            result[d] = math::rotate(normed[d], swapped[d], tables.cos[d], tables.signed_sin[d]);
          finish_row(result, out, D);
        }
      }
      for (int64_t head = 0; head < N; ++head) {
        std::memcpy(p.v.as<T>() + first + head * tokens * D, packed + (2 * N + head) * D,
                    D * sizeof(T));
      }
    }
  }
}

// An upstream gradient; where there is none, zeros.
template <typename T>
View<4> or_zeros(const View<4>& grad, T* zeros) {
  return grad.data != nullptr ? grad : View<4>{zeros, {}, {}, grad.dtype};
}

// With g = grad_q (or grad_k) rotated back and n = u * rstd: grad_u is that of the norm for the
// gradient g * weight, and g * n adds to the gradient of weight.
template <typename T, int kD, typename Real = typename Stats<T>::type>
void backward_tokens(const QkNormRopeBwd& g, Real* partials, int num_threads) {
  const int64_t B = g.qkv.size[0], tokens = g.qkv.size[1], N = g.num_heads;
  const int64_t D = kD > 0 ? kD : head_dim(g);
  const Real inverse_width = Real(1) / Real(D);
  T zeros[kMaxHeadDim] = {};
  const View<4> grads[3] = {or_zeros(g.grad_q, zeros), or_zeros(g.grad_k, zeros),
                            or_zeros(g.grad_v, zeros)};
#pragma omp parallel num_threads(num_threads)
  {
    Tables<Real> tables(g);
    alignas(64) Real u_buffer[kMaxHeadDim], grad_buffer[kMaxHeadDim], swapped[kMaxHeadDim],
        turned[kMaxHeadDim], grad_u_buffer[kMaxHeadDim];
    // in two levels: the rounding errors of one long sum grow with its length
    alignas(64) Real sum_grad_n[2][kMaxHeadDim], sum_of_token[kMaxHeadDim];
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < ceil_div(B * tokens, kTokensPerChunk); ++chunk) {
      const int64_t begin = chunk * kTokensPerChunk;
      const int64_t end = min_of(begin + kTokensPerChunk, B * tokens);
      for (int64_t d = 0; d < D; ++d) sum_grad_n[0][d] = sum_grad_n[1][d] = 0;

      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / tokens, t = item % tokens;
        const T* packed = g.qkv.as<T>() + g.qkv.offset(b, t);
        T* grad_packed = g.grad_qkv.as<T>() + item * 3 * N * D;
        const bool is_rotated = tables.load_angles(g, t);
        for (int which = 0; which < 2; ++which) {
          const Real* weight = tables.weight[which];
          for (int64_t d = 0; d < D; ++d) sum_of_token[d] = 0;
          for (int64_t head = 0; head < N; ++head) {
            const T* grad_out = grads[which].as<T>() + grads[which].offset(b, head, t);
            const Real* u = as_real(packed + (which * N + head) * D, u_buffer, D);
            const Real* grad = as_real(grad_out, grad_buffer, D);
            if (is_rotated) {
              swap_pairs(grad, swapped, D);
#pragma omp simd
              for (int64_t d = 0; d < D; ++d)
                turned[d] =
                    math::rotate_back(grad[d], swapped[d], tables.cos[d], tables.signed_sin[d]);
              grad = turned;
            }
            const Real rstd = head_rstd(u, D, g.eps);
            const Real mean_grad_n_n = inverse_width * sum_head<Real>(D, [&](int64_t d) {
                                         return grad[d] * weight[d] * (u[d] * rstd);
                                       });
            T* grad_row = grad_packed + (which * N + head) * D;
            Real* grad_u = real_target(grad_row, grad_u_buffer);
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) {
              const Real n = u[d] * rstd;
              grad_u[d] = math::norm_grad_x(grad[d] * weight[d], n, rstd, Real(0), mean_grad_n_n);
              sum_of_token[d] += grad[d] * n;
            }
            finish_row(grad_u, grad_row, D);
          }
          for (int64_t d = 0; d < D; ++d) sum_grad_n[which][d] += sum_of_token[d];
        }
        for (int64_t head = 0; head < N; ++head) {
          std::memcpy(grad_packed + (2 * N + head) * D,
                      grads[2].as<T>() + grads[2].offset(b, head, t), D * sizeof(T));
        }
      }
      store_row(sum_grad_n[0], partials + chunk * 2 * D, D);
      store_row(sum_grad_n[1], partials + chunk * 2 * D + D, D);
    }
  }
}

// Adds up the partial sums, always in the same order; few numbers, so one thread does it, in fp64.
template <typename Real>
void backward_sums(const QkNormRopeBwd& g, const Real* partials, int64_t chunks, int64_t D) {
  double sums[2 * kMaxHeadDim] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < 2 * D; ++i) sums[i] += double(partials[chunk * 2 * D + i]);
  store_row(sums, g.grad_q_weight.data, g.grad_q_weight.dtype, 0, D);
  store_row(sums + D, g.grad_k_weight.data, g.grad_k_weight.dtype, 0, D);
}

Status problem(const QkNormRope& p, int64_t D) {
  if (D < 1 || D > kMaxHeadDim || p.qkv.size[2] != 3 * p.num_heads * D)
    return "qkv must have 3 num_heads D channels with 1 <= D <= 256";
  if (!p.q_weight.fits(D) || !p.k_weight.fits(D))
    return "q_weight and k_weight must have shape (D,)";
  if (p.num_prefix_tokens < 0 || p.num_prefix_tokens > p.qkv.size[1])
    return "num_prefix_tokens must be between 0 and the number of tokens";
  const int64_t num_rotated = p.qkv.size[1] - p.num_prefix_tokens;
  const bool is_rotated = p.cos.data != nullptr;
  if (is_rotated != (p.sin.data != nullptr) || (is_rotated && D % 2 != 0) ||
      !p.cos.fits(num_rotated, D / 2) || !p.sin.fits(num_rotated, D / 2))
    return "cos and sin must have shape (T - num_prefix_tokens, D / 2) with an even D, or be None";
  return nullptr;
}

template <int kD>
struct HeadDim {
  static constexpr int value = kD;
};

// Calls fn(T{}, HeadDim<kD>{}).
template <typename Fn>
void with_types(const QkNormRope& p, int64_t D, Fn fn) {
  with_element_type(p.qkv.dtype, [&](auto element) {
    D == 16   ? fn(element, HeadDim<16>{})
    : D == 64 ? fn(element, HeadDim<64>{})
              : fn(element, HeadDim<0>{});
  });
}

}  // namespace

Status qk_norm_rope_fwd(const QkNormRopeFwd& p, const Place& place) {
  const int64_t D = head_dim(p), count = p.qkv.size[0] * p.qkv.size[1] * p.num_heads * D;
  if (const Status status = problem(p, D)) return status;
  if (!p.q.holds(count, p.qkv.dtype) || !p.k.holds(count, p.qkv.dtype) ||
      !p.v.holds(count, p.qkv.dtype))
    return "q, k and v must be as one third of qkv";
  with_types(p, D, [&](auto element, auto head_dim) {
    forward<decltype(element), decltype(head_dim)::value>(p, place.num_threads);
  });
  return nullptr;
}

Status qk_norm_rope_bwd(const QkNormRopeBwd& g, const Place& place) {
  const int64_t B = g.qkv.size[0], tokens = g.qkv.size[1], N = g.num_heads, D = head_dim(g);
  if (const Status status = problem(g, D)) return status;
  const View<4> grads[] = {g.grad_q, g.grad_k, g.grad_v};
  for (const View<4>& grad : grads)
    if (grad.data != nullptr && (!grad.fits(B, N, tokens, D) || grad.dtype != g.qkv.dtype ||
                                 (D > 1 && grad.stride[3] != 1)))
      return "gradients must have shape (B, N, T, D), D contiguous, and the dtype of qkv";
  if (!g.grad_qkv.holds(B * tokens * 3 * N * D, g.qkv.dtype) ||
      !g.grad_q_weight.holds(D, g.q_weight.dtype) || !g.grad_k_weight.holds(D, g.k_weight.dtype))
    return "the results must be as qkv, q_weight and k_weight";
  const int64_t chunks = ceil_div(B * tokens, kTokensPerChunk);
  Status status = kNoMemory;
  with_types(g, D, [&](auto element, auto head_dim) {
    using Real = typename Stats<decltype(element)>::type;
    Real* partials = place.scratch<Real>(chunks * 2 * D);
    if (partials == nullptr) return;
    backward_tokens<decltype(element), decltype(head_dim)::value>(g, partials, place.num_threads);
    backward_sums(g, partials, chunks, D);
    status = nullptr;
  });
  return status;
}

PIXELGEN_OPS(qk_norm_rope, PIXELGEN_OP(qk_norm_rope_fwd), PIXELGEN_OP(qk_norm_rope_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
