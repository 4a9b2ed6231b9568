// Bound by bytes: x and y are read once, residual and normed written once (backward: grad_residual,
// grad_normed, residual and y read, grad_x and grad_y written). The gate is read once per row, from
// L1 for all but the first. The kernels are those of norm_fwd.cuh and norm_bwd.cuh.
#include "../gate_residual_norm_modulate.h"
#include "norm_bwd.cuh"
#include "norm_fwd.cuh"
#include "norm_rows.cuh"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

// N neighbours of y, on their way; those of the gate come from L1 for all but the first row of an
// image and are fetched when they are needed.
template <int N>
struct FetchedBranch {
  Fetched<AnyDtype, N> y;

  __device__ __forceinline__ void fetch(const GatedBranch& b, int64_t image, int64_t row, int c) {
    y.fetch(b.y, b.y_dtype, image * b.y_image_stride + row * b.y_row_stride + c);
  }
  __device__ __forceinline__ void values(const GatedBranch& b, int64_t image, int64_t row, int c,
                                         float (&y_out)[N], float (&gate_out)[N]) const {
    const int64_t row_of_gate = b.gate_per_token ? row * b.gate_row_stride : 0;
    Fetched<AnyDtype, N> gate;
    gate.fetch(b.gate, b.gate_dtype, image * b.gate_image_stride + row_of_gate + c);
    y.values(b.y_dtype, y_out);
    gate.values(b.gate_dtype, gate_out);
  }
};

// The rows of x + gate * y, which become the residual.
template <typename Packs>
struct GatedRows {
  using T = typename Packs::T;
  static constexpr int N = Packs::N;
  using Params = GateResidualNormModulateParams;
  static __host__ __device__ const RmsNormModulateParams& norm(const Params& p) { return p.norm; }

  struct Fetch {
    Fetched<T, N> x;
    FetchedBranch<N> branch;

    __device__ __forceinline__ void fetch(const Params& params, int64_t image, int64_t row, int c) {
      const RmsNormModulateParams& p = params.norm;
      x.fetch(p.x, p.x_dtype, image * p.x_image_stride + row * p.x_row_stride + c);
      branch.fetch(params.branch, image, row, c);
    }
    __device__ __forceinline__ void values(const Params& params, int64_t image, int64_t row, int c,
                                           float (&out)[N]) const {
      const DType dtype = params.norm.x_dtype;
      float y[N], gate[N];
      x.values(dtype, out);
      branch.values(params.branch, image, row, c, y, gate);
#pragma unroll
      for (int j = 0; j < N; ++j)
        out[j] = rounded<T>(math::add_gated(out[j], gate[j], y[j]), dtype);
    }
  };
  static __device__ __forceinline__ void keep(const Params& params, int64_t dense_row, int c,
                                              const float (&residual)[N]) {
    const RmsNormModulateParams& p = params.norm;
    store_values<T>(residual, params.residual, p.x_dtype, dense_row * p.C + c);
  }
};

// With grad = the gradient of the norm's input + grad_residual: that of x is grad, and those of y
// and gate follow from it.
template <typename Packs>
struct GatedGrads {
  using T = typename Packs::T;
  static constexpr int N = Packs::N, kSums = 1;
  using Params = GateResidualNormModulateGradParams;
  static __host__ __device__ const RmsNormModulateGradParams& norm(const Params& g) {
    return g.norm;
  }
  static __device__ void* partials(const Params& g) { return g.gate_partials; }

  struct Fetch {
    Fetched<T, N> grad_residual;
    FetchedBranch<N> branch;

    __device__ __forceinline__ void fetch(const Params& g, int64_t image, int64_t row, int c) {
      grad_residual.fetch(
          g.grad_residual, g.norm.forward.x_dtype,
          image * g.grad_residual_image_stride + row * g.grad_residual_row_stride + c);
      branch.fetch(g.branch, image, row, c);
    }
    __device__ __forceinline__ void store(const Params& g, int64_t image, int64_t row, int c,
                                          float (&grad)[N], float (&sum_gate)[N]) const {
      const RmsNormModulateParams& p = g.norm.forward;
      const int64_t offset = (image * p.rows_per_image + row) * p.C + c;
      float residual[N], y[N], gate[N];
      grad_residual.values(p.x_dtype, residual);
      branch.values(g.branch, image, row, c, y, gate);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        grad[j] += residual[j];
        const math::BranchGrads<float> grads = math::branch_grads(gate[j], y[j], grad[j]);
        y[j] = grads.y;
        gate[j] = grads.gate;
        sum_gate[j] += grads.gate;
      }
      store_values<T>(grad, g.norm.grad_x, p.x_dtype, offset);
      store_as<N, true>(y, g.grad_y, g.branch.y_dtype, offset, N);
      if (g.branch.gate_per_token) {
        store_as<N, true>(gate, g.grad_gate, g.branch.gate_dtype, offset, N);
      }
    }
  };
};

bool branch_is_aligned(const GatedBranch& b, int pack) {
  return packs_are_aligned(b.y, b.y_dtype, pack, b.y_image_stride, b.y_row_stride) &&
         packs_are_aligned(b.gate, b.gate_dtype, pack, b.gate_image_stride,
                           b.gate_per_token ? b.gate_row_stride : 0);
}

}  // namespace

Status gate_residual_norm_modulate_fwd(const GateResidualNormModulateParams& p, void* stream) {
  const auto is_aligned = [&](int pack) {
    return norm_is_aligned(p.norm, pack, kMaxThreads) && branch_is_aligned(p.branch, pack) &&
           packs_are_aligned(p.residual, p.norm.x_dtype, pack, p.norm.C, 0);
  };
  return with_packs(p.norm, is_aligned, [&](auto packs) {
    return launch_norm_fwd<GatedRows<decltype(packs)>>(p, static_cast<cudaStream_t>(stream));
  });
}

Status gate_residual_norm_modulate_bwd(const GateResidualNormModulateGradParams& g, void* stream) {
  const DType x_dtype = g.norm.forward.x_dtype;
  const int64_t C = g.norm.forward.C;
  const auto is_aligned = [&](int pack) {
    return norm_grads_are_aligned(g.norm, pack) && branch_is_aligned(g.branch, pack) &&
           packs_are_aligned(g.grad_residual, x_dtype, pack, g.grad_residual_image_stride,
                             g.grad_residual_row_stride) &&
           packs_are_aligned(g.grad_y, g.branch.y_dtype, pack, C, 0) &&
           packs_are_aligned(g.grad_gate, g.branch.gate_dtype, pack, C, 0);
  };
  const GateSums gate{static_cast<const float*>(g.gate_partials), g.grad_gate, g.branch.gate_dtype};
  return with_packs(g.norm.forward, is_aligned, [&](auto packs) {
    return launch_norm_bwd<GatedGrads<decltype(packs)>>(g, gate, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace pixelgen::cuda
