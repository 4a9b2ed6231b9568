// d_b = 1 / (H W) * sum over positions and channels of weight_c (u_c - v_c)^2
// u = pred / (|pred| + eps), v = target / (|target| + eps), the norms over channels; 0 where the
// norm is 0
// grad_pred_c = 2 grad_d_b / (H W) / (|pred| + eps) * (weight_c (u_c - v_c) - pred_c radial)
// radial = sum_c weight_c (u_c - v_c) u_c / |pred|
// Arithmetic in fp32 (fp64 when pred or target is fp64): the "stats dtype" below.
#pragma once

#include "../common/distances.h"
#include "../common/op.h"

namespace pixelgen {

struct LpipsDistance {
  Tensor<4> pred, target;  // (B, C, H, W)
  Tensor<1> weight;        // (C,)
  // (B, 3, H W) stats dtype, kept for backward: |pred| + eps and |target| + eps, 0 where the norm
  // is 0; radial
  Dense statistics;

  PIXELGEN_MEMBER DType stats() const { return stats_dtype(pred.dtype, target.dtype); }
  PIXELGEN_MEMBER int64_t size() const { return pred.size[2] * pred.size[3]; }  // positions
  template <typename Real>
  PIXELGEN_MEMBER Real* statistics_of(int64_t b) const {  // three rows of size()
    return statistics.as<Real>() + 3 * size() * b;
  }
  PIXELGEN_MEMBER Status check_shared() const {
    const auto [B, C, H, W] = pred.size;
    if (!target.fits(B, C, H, W)) return "target must have the shape of pred";
    if (!weight.fits(C)) return "weight must have one number per channel";
    return statistics.holds(B * 3 * size(), stats()) ? nullptr
                                                     : "statistics must have 3 rows per sample";
  }
};

struct LpipsDistanceFwd : LpipsDistance {
  Dense distance;  // (B,) stats dtype
  double eps;
  PIXELGEN_ARGUMENTS(pred, target, weight, distance, statistics, eps)

  PIXELGEN_MEMBER Status check() const {
    if (!distance.holds(pred.size[0], stats())) return "distance must have one number per sample";
    return check_shared();
  }
};

struct LpipsDistanceBwd : LpipsDistance {
  Tensor<1> grad_distance;  // (B,)
  Tensor<4> grad_pred;      // as pred, any strides
  PIXELGEN_ARGUMENTS(grad_distance, pred, target, weight, statistics, grad_pred)

  PIXELGEN_MEMBER Status check() const {
    const auto [B, C, H, W] = pred.size;
    if (!grad_distance.fits(B)) return "grad_distance must have one number per sample";
    if (!grad_pred.fits(B, C, H, W) || grad_pred.dtype != pred.dtype)
      return "grad_pred must be as pred";
    return check_shared();
  }
};

// Positions become one row where they are evenly spaced in all maps; those of one column are.
template <typename... Maps>
PIXELGEN_INLINE void join_positions(Maps&... maps) {
  ((maps.stride[3] = maps.stride[maps.size[3] == 1 ? 2 : 3]), ...);
  join<2>(maps...);
}

// Positions that are added up before the second pass, of about so many elements. A multiple of 4
// where C allows it: the CUDA kernels for NCHW read 4 positions at a time.
PIXELGEN_INLINE int64_t positions_of_chunk(int64_t elements, int64_t C) {
  const int64_t positions = C > 0 ? elements / C / 4 * 4 : 0;
  return positions > 0 ? positions : 1;
}

}  // namespace pixelgen
