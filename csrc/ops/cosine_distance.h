// d_b = 1 / T * sum over tokens of 1 - cosine
// cosine = <u, v>, u = pred / max(|pred|, eps), v = target / max(|target|, eps); 0 where a vector
// is zero
// grad_pred = grad_d_b / T / max(|pred|, eps) * (u cosine - v), the first term absent where
// |pred| < eps, all of it where pred is zero; grad_target likewise
// Arithmetic in fp32 (fp64 when pred or target is fp64): the "stats dtype" below.
#pragma once

#include "../common/distances.h"
#include "../common/op.h"

namespace pixelgen {

struct CosineDistance {
  Tensor<3> pred, target;  // (B, T, D)
  Dense statistics;        // (B, 3, T) stats dtype, kept for backward: |pred|, |target|, cosine
  double eps;

  PIXELGEN_MEMBER DType stats() const { return stats_dtype(pred.dtype, target.dtype); }
  PIXELGEN_MEMBER Status check_shared() const {
    const auto [B, T, D] = pred.size;
    if (!target.fits(B, T, D)) return "target must have the shape of pred";
    return statistics.holds(B * 3 * T, stats()) ? nullptr
                                                : "statistics must have 3 rows per sample";
  }
};

struct CosineDistanceFwd : CosineDistance {
  Dense distance;  // (B,) stats dtype
  PIXELGEN_ARGUMENTS(pred, target, distance, statistics, eps)

  PIXELGEN_MEMBER Status check() const {
    if (!distance.holds(pred.size[0], stats())) return "distance must have one number per sample";
    return check_shared();
  }
};

struct CosineDistanceBwd : CosineDistance {
  Tensor<1> grad_distance;       // (B,)
  Dense grad_pred, grad_target;  // as pred and target, or empty where not wanted
  PIXELGEN_ARGUMENTS(grad_distance, pred, target, statistics, grad_pred, grad_target, eps)

  PIXELGEN_MEMBER Status check() const {
    const int64_t B = pred.size[0], count = B * pred.size[1] * pred.size[2];
    if (!grad_distance.fits(B)) return "grad_distance must have one number per sample";
    if (!grad_pred.holds_or_empty(count, pred.dtype)) return "grad_pred must be as pred or empty";
    if (!grad_target.holds_or_empty(count, target.dtype))
      return "grad_target must be as target or empty";
    return check_shared();
  }
};

}  // namespace pixelgen
