// Bound by bytes: x and y are read once, residual and normed written once (backward: grad_residual,
// grad_normed, residual and y read, grad_x and grad_y written). The gate is read once per row, from
// L1 for all but the first. The kernels are those of norm_fwd.cuh and norm_bwd.cuh.
#include "../common/norm_bwd.cuh"
#include "../common/norm_fwd.cuh"
#include "gate_residual_norm_modulate.h"

namespace pixelgen::cuda {
namespace {

// N neighbours of y, on their way; those of the gate come from L1 for all but the first row of an
// image and are fetched when they are needed.
template <int N>
struct FetchedBranch {
  Fetched<AnyDtype, N> y;

  __device__ __forceinline__ void fetch(const GatedBranch& b, int64_t image, int64_t row, int c) {
    y.fetch(b.y, b.y.offset(image, row) + c);
  }
  __device__ __forceinline__ void values(const GatedBranch& b, int64_t image, int64_t row, int c,
                                         float (&y_out)[N], float (&gate_out)[N]) const {
    Fetched<AnyDtype, N> gate;
    gate.fetch(b.gate, b.gate.row(image, row) + c);
    y.values(b.y.dtype, y_out);
    gate.values(b.gate.dtype, gate_out);
  }
};

// The rows of x + gate * y, which become the residual.
template <typename Packs>
struct GatedRows {
  using T = typename Packs::T;
  static constexpr int N = Packs::N;
  using Op = GateResidualNormModulateFwd;

  struct Fetch {
    Fetched<T, N> x;
    FetchedBranch<N> branch;

    __device__ __forceinline__ void fetch(const NormFwd& p, const Op& op, int64_t image,
                                          int64_t row, int c) {
      x.fetch(p.x, p.x.offset(image, row) + c);
      branch.fetch(op, image, row, c);
    }
    __device__ __forceinline__ void values(const NormFwd& p, const Op& op, int64_t image,
                                           int64_t row, int c, float (&out)[N]) const {
      float y[N], gate[N];
      x.values(p.x.dtype, out);
      branch.values(op, image, row, c, y, gate);
#pragma unroll
      for (int j = 0; j < N; ++j)
        out[j] = rounded<T>(math::add_gated(out[j], gate[j], y[j]), p.x.dtype);
    }
  };
  static __device__ __forceinline__ void keep(const NormFwd& p, const Op& op, int64_t dense_row,
                                              int c, const float (&residual)[N]) {
    store_values<T>(residual, op.residual, dense_row * p.width() + c);
  }
};

// With grad = the gradient of the norm's input + grad_residual: that of x is grad, and those of y
// and gate follow from it.
template <typename Packs>
struct GatedGrads {
  using T = typename Packs::T;
  static constexpr int N = Packs::N, kSums = 1;
  using Op = GateResidualNormModulateBwd;

  struct Fetch {
    Fetched<T, N> grad_residual;
    FetchedBranch<N> branch;

    __device__ __forceinline__ void fetch(const NormBwd&, const Op& op, int64_t image, int64_t row,
                                          int c) {
      const View<3>& upstream = op.grad_residual;
      if (upstream.data != nullptr) grad_residual.fetch(upstream, upstream.offset(image, row) + c);
      branch.fetch(op, image, row, c);
    }
    __device__ __forceinline__ void store(const NormBwd& p, const Op& op, int64_t image,
                                          int64_t row, int c, float (&grad)[N],
                                          float (&sum_gate)[N]) const {
      const int64_t offset = (image * p.rows_per_image() + row) * p.width() + c;
      float upstream[N], y[N], gate[N];
      values_or(grad_residual, op.grad_residual, 0.0f, upstream);
      branch.values(op, image, row, c, y, gate);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        grad[j] += upstream[j];
        const math::BranchGrads<float> grads = math::branch_grads(gate[j], y[j], grad[j]);
        y[j] = grads.y;
        gate[j] = grads.gate;
        sum_gate[j] += grads.gate;
      }
      store_values<T>(grad, p.grad_x, offset);
      store_values<AnyDtype>(y, op.grad_y, offset);
      if (op.gate.per_row) store_values<AnyDtype>(gate, op.grad_gate, offset);
    }
  };
};

}  // namespace

Status gate_residual_norm_modulate_fwd(const GateResidualNormModulateFwd& a, const Place& place) {
  NormFwd p;
  const Status status = make_norm(a, &p);
  if (status != nullptr) return status;
  const auto is_aligned = [&](int pack) {
    return norm_is_packed(p, pack, kMaxThreads) && is_packed(p.y, pack, p.width()) &&
           is_packed(a.y, pack) && is_packed(a.gate, pack) &&
           is_packed(a.residual, pack, p.width());
  };
  return with_packs(p.x.dtype, is_aligned, [&](auto packs) {
    return launch_norm_fwd<GatedRows<decltype(packs)>>(p, a, place);
  });
}

Status gate_residual_norm_modulate_bwd(const GateResidualNormModulateBwd& a, const Place& place) {
  NormBwd p;
  const Status status = make_norm(a, kBackwardChunks, place, &p);
  if (status != nullptr) return status;
  const auto is_aligned = [&](int pack) {
    return norm_grads_are_packed(p, pack) && is_packed(a.y, pack) && is_packed(a.gate, pack) &&
           is_packed(a.grad_residual, pack) && is_packed(a.grad_y, pack, p.width()) &&
           is_packed(a.grad_gate, pack, p.width());
  };
  const Dense& own_grad = a.gate.per_row ? Dense{} : a.grad_gate;
  return with_packs(p.x.dtype, is_aligned, [&](auto packs) {
    return launch_norm_bwd<GatedGrads<decltype(packs)>>(p, a, own_grad, place);
  });
}

PIXELGEN_OPS(gate_residual_norm_modulate, PIXELGEN_OP(gate_residual_norm_modulate_fwd),
             PIXELGEN_OP(gate_residual_norm_modulate_bwd))

}  // namespace pixelgen::cuda
