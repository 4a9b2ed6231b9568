// Bound by bytes: pred and target are read once from memory. Forward needs the norms before it can
// take differences, so it reads a tile of positions with all of its channels twice: from the cache,
// and as it was converted the first time. Backward needs one pass, for the norms are kept. Vectors
// run over positions, or over channels where those are the neighbours in memory.
#include "lpips_distance.h"

#include "../common/chunks.h"
#include "../math/distance.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

using math::Divisor;

// Of a lambda: a loop that calls it is not made vectors.
#define PIXELGEN_INLINED __attribute__((always_inline))

constexpr int64_t kBlock = 256;         // positions at a time, at most
constexpr int64_t kFewest = 16;         // and at least: a cache line of each channel
constexpr int64_t kTileBytes = 131072;  // of either map
constexpr int kRows = 8;                // channels at a time
constexpr int64_t kSegment = 1024;      // channels of a position that are converted at a time

Chunks chunks_of(const LpipsDistance& a) {
  constexpr int64_t kElements = 131072;  // what fills an even share of the cores
  const int64_t C = a.pred.size[1];
  return {a.pred.size[0], a.size(), positions_of_chunk(kElements, C), C};
}

bool channels_are_neighbours(const View<4>& pred) {
  return pred.size[1] > 1 && (pred.size[3] == 1 || pred.stride[1] < pred.stride[3]);
}

// Calls fn(first, h, w, n) for the positions [first, first + n) = (h, [w, w + n)), at most `block`
// at a time, for those from `begin` to before `end`. A block lies within one row.
template <typename Fn>
inline void for_blocks(int64_t W, int64_t begin, int64_t end, int64_t block, Fn fn) {
  for (int64_t first = begin; first < end;) {
    const int64_t h = first / W, w = first % W;
    const int64_t n = min_of(min_of(W - w, end - first), block);
    fn(first, h, w, n);
    first += n;
  }
}

// n positions of some channels; those of a channel are neighbours.
template <typename Real>
struct Channels {
  const Real* first;
  int64_t stride;
};

// Calls fn(r) for 0 <= r < kCount. Spelt out: a loop within a loop is not made vectors.
template <int kCount, typename Fn>
PIXELGEN_INLINE void for_rows(Fn fn) {
  if constexpr (kCount == kRows) {
    fn(0), fn(1), fn(2), fn(3), fn(4), fn(5), fn(6), fn(7);
  } else {
    static_assert(kCount == 1, "rows are taken in groups of kRows, the last ones alone");
    fn(0);
  }
}

// term(0) + ... + term(kCount - 1), in pairs.
template <int kCount, typename Real, typename Term>
PIXELGEN_INLINE Real sum_rows(Term term) {
  if constexpr (kCount == kRows)
    return ((term(0) + term(1)) + (term(2) + term(3))) +
           ((term(4) + term(5)) + (term(6) + term(7)));
  else
    return term(0);
}

// Calls fn(c, count) for all channels, count = integral constant of kRows or 1.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};
template <typename Fn>
inline void for_channels(int64_t C, Fn fn) {
  int64_t c = 0;
  for (; c + kRows <= C; c += kRows) fn(c, Count<kRows>{});
  for (; c < C; ++c) fn(c, Count<1>{});
}

// n positions of `count` channels from c on: in place where they can be, else copied to rows of
// `buffer` that are `stride` apart, unless they are there already.
template <typename Real>
inline Channels<Real> channels_of(const View<4>& map, int64_t b, int64_t c, int count, int64_t h,
                                  int64_t w, int64_t n, Real* buffer, int64_t stride,
                                  bool is_copied = false) {
  constexpr DType kReal = sizeof(Real) == sizeof(float) ? DType::kFloat32 : DType::kFloat64;
  const int64_t offset = map.offset(b, c, h, w);
  if (map.dtype == kReal && map.stride[3] == 1) return {map.as<Real>() + offset, map.stride[1]};
  if (is_copied) return {buffer, stride};
  with_element_type(map.dtype, [&](auto element) {
    using E = decltype(element);
    const E* source = map.as<E>() + offset;
    for (int r = 0; r < count; ++r) {
      gather(source + r * map.stride[1], map.stride[3], buffer + r * stride, n,
             [](E value) { return math::to_real<Real>(value); });
    }
  });
  return {buffer, stride};
}

// sums += the squares of kCount rows.
template <int kCount, typename Real>
inline void add_squares(Channels<Real> rows, double* __restrict sums, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    sums[i] += sum_rows<kCount, Real>([&](int r) PIXELGEN_INLINED {
      const Real value = rows.first[r * rows.stride + i];
      return value * value;
    });
  }
}

// The norm with eps, or 0.
template <typename Real>
inline Real norm_with_eps(double square, double eps) {
  return square == 0 ? Real(0) : Real(__builtin_sqrt(square) + eps);
}

// The divisors of a block's positions.
template <typename Real>
struct Divisors {
  alignas(64) Real value[kBlock], inverse[kBlock];

  inline void set(const Real* __restrict norms, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Divisor<Real> divisor = math::divisor(norms[i]);
      value[i] = divisor.value;
      inverse[i] = divisor.inverse;
    }
  }
};

// distances += weight (u - v)^2, alongs += weight (u - v) u of kCount rows.
template <int kCount, typename Real>
inline void add_differences(Channels<Real> p, Channels<Real> q, const Real* weights,
                            const Divisors<Real>& p_divisors, const Divisors<Real>& q_divisors,
                            double* __restrict distances, double* __restrict alongs, int64_t n) {
  const Real *p_value = p_divisors.value, *p_inverse = p_divisors.inverse;
  const Real *q_value = q_divisors.value, *q_inverse = q_divisors.inverse;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Divisor<Real> p_divisor{p_value[i], p_inverse[i]}, q_divisor{q_value[i], q_inverse[i]};
    const auto unit = [&](int r) PIXELGEN_INLINED {
      return math::quotient(p.first[r * p.stride + i], p_divisor);
    };
    const auto difference = [&](int r) PIXELGEN_INLINED {
      return unit(r) - math::quotient(q.first[r * q.stride + i], q_divisor);
    };
    distances[i] += sum_rows<kCount, Real>(
        [&](int r) PIXELGEN_INLINED { return weights[r] * difference(r) * difference(r); });
    alongs[i] += sum_rows<kCount, Real>(
        [&](int r) PIXELGEN_INLINED { return weights[r] * difference(r) * unit(r); });
  }
}

template <int kCount, typename Real>
inline void load_weights(const View<1>& weight, int64_t c, Real* weights) {
  for (int r = 0; r < kCount; ++r) weights[r] = number<Real>(weight, c + r);
}

// The sum over the positions of a chunk.
template <typename Real>
double chunk_by_position(const LpipsDistanceFwd& a, int64_t b, int64_t begin, int64_t end) {
  constexpr int64_t kTile = kTileBytes / sizeof(Real);
  alignas(64) Real p_tile[kTile], q_tile[kTile];
  // The sums are double: adding hundreds of channels one by one in float would cost digits.
  alignas(64) double p_sums[kBlock], q_sums[kBlock];
  alignas(64) Real plain_norms[kBlock];
  Divisors<Real> p_divisors, q_divisors;
  const int64_t size = a.size(), C = a.pred.size[1];
  Real* norms = a.statistics_of<Real>(b);
  const View<4> pred = a.pred, target = a.target;  // of its own: what is stored cannot change them
  const bool fits = C <= kTile / kFewest;          // else rows are converted twice
  const int64_t at_a_time = fits ? min_of(kTile / C / kFewest * kFewest, kBlock) : kFewest;
  double total = 0;
  for_blocks(a.pred.size[3], begin, end, at_a_time,
             [&](int64_t first, int64_t h, int64_t w, int64_t n) {
               Real *p_norm = norms + first, *q_norm = p_norm + size, *radial = q_norm + size;
               const auto rows = [&](const View<4>& map, int64_t c, int count, Real* tile,
                                     bool is_second) {
                 return channels_of(map, b, c, count, h, w, n, tile + (fits ? c * at_a_time : 0),
                                    at_a_time, is_second && fits);
               };
               for (int64_t i = 0; i < n; ++i) p_sums[i] = q_sums[i] = 0;
               for_channels(C, [&](int64_t c, auto count) {
                 constexpr int kCount = decltype(count)::value;
                 add_squares<kCount>(rows(pred, c, kCount, p_tile, false), p_sums, n);
                 add_squares<kCount>(rows(target, c, kCount, q_tile, false), q_sums, n);
               });
#pragma omp simd
               for (int64_t i = 0; i < n; ++i) {
                 p_norm[i] = norm_with_eps<Real>(p_sums[i], a.eps);
                 q_norm[i] = norm_with_eps<Real>(q_sums[i], a.eps);
                 plain_norms[i] = Real(__builtin_sqrt(p_sums[i]));
                 p_sums[i] = q_sums[i] = 0;
               }
               p_divisors.set(p_norm, n);
               q_divisors.set(q_norm, n);
               double *distances = p_sums, *alongs = q_sums;
               for_channels(C, [&](int64_t c, auto count) {
                 constexpr int kCount = decltype(count)::value;
                 Real weights[kCount];
                 load_weights<kCount>(a.weight, c, weights);
                 add_differences<kCount>(rows(pred, c, kCount, p_tile, true),
                                         rows(target, c, kCount, q_tile, true), weights, p_divisors,
                                         q_divisors, distances, alongs, n);
               });
#pragma omp simd
               for (int64_t i = 0; i < n; ++i)
                 radial[i] = plain_norms[i] == 0 ? Real(0) : Real(alongs[i] / plain_norms[i]);
               total += sum_columns<double>(n, [&](int64_t i) { return distances[i]; });
             });
  return total;
}

// Calls fn(p, q, weight, c, n) with the channels [c, c + n) of a position.
template <typename Real, typename Fn>
inline void for_segments(const LpipsDistance& a, int64_t b, int64_t position, Fn fn) {
  alignas(64) Real p_buffer[kSegment], q_buffer[kSegment], weight_buffer[kSegment];
  const int64_t C = a.pred.size[1], W = a.pred.size[3], h = position / W, w = position % W;
  for (int64_t c = 0; c < C; c += kSegment) {
    const int64_t n = min_of(C - c, kSegment);
    fn(as_real(a.pred, 1, p_buffer, n, b, c, h, w), as_real(a.target, 1, q_buffer, n, b, c, h, w),
       as_real(a.weight, 0, weight_buffer, n, c), c, n);
  }
}

template <typename Real>
double chunk_by_channel(const LpipsDistanceFwd& a, int64_t b, int64_t begin, int64_t end) {
  const int64_t size = a.size();
  Real* norms = a.statistics_of<Real>(b);
  double total = 0;
  for (int64_t first = begin; first < end; ++first) {
    double p_square = 0, q_square = 0;
    for_segments<Real>(a, b, first,
                       [&](const Real* u, const Real* v, const Real*, int64_t, int64_t n) {
                         Real u_square = 0, v_square = 0;
#pragma omp simd reduction(+ : u_square, v_square)
                         for (int64_t c = 0; c < n; ++c) {
                           u_square += u[c] * u[c];
                           v_square += v[c] * v[c];
                         }
                         p_square += u_square;
                         q_square += v_square;
                       });
    const Real p_norm = norm_with_eps<Real>(p_square, a.eps);
    const Real q_norm = norm_with_eps<Real>(q_square, a.eps);
    const Divisor<Real> p_divisor = math::divisor(p_norm), q_divisor = math::divisor(q_norm);
    double distance = 0, along = 0;
    for_segments<Real>(a, b, first,
                       [&](const Real* u, const Real* v, const Real* weight, int64_t, int64_t n) {
                         Real squares = 0, products = 0;
#pragma omp simd reduction(+ : squares, products)
                         for (int64_t c = 0; c < n; ++c) {
                           const Real unit = math::quotient(u[c], p_divisor);
                           const Real difference = unit - math::quotient(v[c], q_divisor);
                           squares += weight[c] * difference * difference;
                           products += weight[c] * difference * unit;
                         }
                         distance += squares;
                         along += products;
                       });
    norms[first] = p_norm;
    norms[size + first] = q_norm;
    norms[2 * size + first] = p_square == 0 ? Real(0) : Real(along / __builtin_sqrt(p_square));
    total += distance;
  }
  return total;
}

template <typename Real>
Status forward(LpipsDistanceFwd a, const Place& place) {
  join_positions(a.pred, a.target);
  const bool by_channel = channels_are_neighbours(a.pred);
  return chunk_means<Real>(a.distance, chunks_of(a), place,
                           [&](int64_t b, int64_t begin, int64_t end) {
                             return by_channel ? chunk_by_channel<Real>(a, b, begin, end)
                                               : chunk_by_position<Real>(a, b, begin, end);
                           });
}

// out = term(i), n elements `stride` apart.
template <typename T, typename Term>
inline void store_terms(T* __restrict out, int64_t stride, int64_t n, Term term) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) math::from_real(term(i), &out[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) math::from_real(term(i), &out[i * stride]);
  }
}

// grad = the gradient of kCount rows, which are stride_c apart.
template <int kCount, typename T, typename Real>
inline void store_grads(Channels<Real> p, Channels<Real> q, const Real* weights,
                        const Divisors<Real>& p_divisors, const Divisors<Real>& q_divisors,
                        const Real* __restrict radial, Real factor, T* __restrict grad,
                        int64_t stride_c, int64_t stride_w, int64_t n) {
  const Real *p_value = p_divisors.value, *p_inverse = p_divisors.inverse;
  const Real *q_value = q_divisors.value, *q_inverse = q_divisors.inverse;
  const auto value = [&](int r, int64_t i) PIXELGEN_INLINED {
    return math::unit_distance_grad(p.first[r * p.stride + i], q.first[r * q.stride + i],
                                    weights[r], Divisor<Real>{p_value[i], p_inverse[i]},
                                    Divisor<Real>{q_value[i], q_inverse[i]}, radial[i], factor);
  };
  if (stride_w == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      for_rows<kCount>(
          [&](int r) PIXELGEN_INLINED { math::from_real(value(r, i), &grad[r * stride_c + i]); });
  } else {
    for (int64_t i = 0; i < n; ++i)
      for_rows<kCount>([&](int r) PIXELGEN_INLINED {
        math::from_real(value(r, i), &grad[r * stride_c + i * stride_w]);
      });
  }
}

template <typename T, typename Real>
void grads_by_position(const LpipsDistanceBwd& g, int64_t b, int64_t begin, int64_t end,
                       Real factor) {
  const int64_t stride_c = g.grad_pred.stride[1], stride_w = g.grad_pred.stride[3];
  const int64_t size = g.size();
  const Real* norms = g.statistics_of<Real>(b);
  const View<4> pred = g.pred, target = g.target;  // of its own: what is stored cannot change them
  alignas(64) Real p_buffer[kRows * kBlock], q_buffer[kRows * kBlock];
  Divisors<Real> p_divisors, q_divisors;
  for_blocks(
      g.pred.size[3], begin, end, kBlock, [&](int64_t first, int64_t h, int64_t w, int64_t n) {
        const Real *p_norm = norms + first, *q_norm = p_norm + size, *radial = q_norm + size;
        p_divisors.set(p_norm, n);
        q_divisors.set(q_norm, n);
        T* block = g.grad_pred.as<T>() + g.grad_pred.offset(b, 0, h, w);
        for_channels(g.pred.size[1], [&](int64_t c, auto count) {
          constexpr int kCount = decltype(count)::value;
          const Channels<Real> u = channels_of(pred, b, c, kCount, h, w, n, p_buffer, kBlock);
          const Channels<Real> v = channels_of(target, b, c, kCount, h, w, n, q_buffer, kBlock);
          Real weights[kCount];
          load_weights<kCount>(g.weight, c, weights);
          store_grads<kCount>(u, v, weights, p_divisors, q_divisors, radial, factor,
                              block + c * stride_c, stride_c, stride_w, n);
        });
      });
}

template <typename T, typename Real>
void grads_by_channel(const LpipsDistanceBwd& g, int64_t b, int64_t begin, int64_t end,
                      Real factor) {
  const int64_t size = g.size(), W = g.pred.size[3], stride_c = g.grad_pred.stride[1];
  const Real* norms = g.statistics_of<Real>(b);
  for (int64_t first = begin; first < end; ++first) {
    const Divisor<Real> p_divisor = math::divisor(norms[first]);
    const Divisor<Real> q_divisor = math::divisor(norms[size + first]);
    const Real radial = norms[2 * size + first];
    T* grad = g.grad_pred.as<T>() + g.grad_pred.offset(b, 0, first / W, first % W);
    for_segments<Real>(
        g, b, first,
        [&](const Real* u, const Real* v, const Real* weight, int64_t segment, int64_t n) {
          store_terms(grad + segment * stride_c, stride_c, n, [&](int64_t c) {
            return math::unit_distance_grad(u[c], v[c], weight[c], p_divisor, q_divisor, radial,
                                            factor);
          });
        });
  }
}

template <typename Real>
Status backward(LpipsDistanceBwd g, const Place& place) {
  join_positions(g.pred, g.target, g.grad_pred);
  const bool by_channel = channels_are_neighbours(g.pred);
  for_chunks(chunks_of(g), place, [&](int64_t b, int64_t begin, int64_t end) {
    const double grad = number<Real>(g.grad_distance, b);
    const Real factor = Real(grad * 2.0 / double(g.size()));
    with_element_type(g.pred.dtype, [&](auto element) {
      using T = decltype(element);
      if (by_channel)
        grads_by_channel<T>(g, b, begin, end, factor);
      else
        grads_by_position<T>(g, b, begin, end, factor);
    });
  });
  return nullptr;
}

}  // namespace

Status lpips_distance_fwd(const LpipsDistanceFwd& a, const Place& place) {
  return checked(a, [&](auto real) { return forward<decltype(real)>(a, place); });
}

Status lpips_distance_bwd(const LpipsDistanceBwd& g, const Place& place) {
  return checked(g, [&](auto real) { return backward<decltype(real)>(g, place); });
}

PIXELGEN_OPS(lpips_distance, PIXELGEN_OP(lpips_distance_fwd), PIXELGEN_OP(lpips_distance_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
