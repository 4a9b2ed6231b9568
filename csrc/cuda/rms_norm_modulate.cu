// Bound by bytes: x is read once and y written once (backward: x and grad_y read, grad_x written).
// The kernels are those of norm_fwd.cuh and norm_bwd.cuh.
#include "../rms_norm_modulate.h"
#include "norm_bwd.cuh"
#include "norm_fwd.cuh"
#include "norm_rows.cuh"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

// The rows of x, as they are.
template <typename Packs>
struct PlainRows {
  using T = typename Packs::T;
  static constexpr int N = Packs::N;
  using Params = RmsNormModulateParams;
  static __host__ __device__ const RmsNormModulateParams& norm(const Params& p) { return p; }

  struct Fetch {
    Fetched<T, N> x;

    __device__ __forceinline__ void fetch(const Params& p, int64_t image, int64_t row, int c) {
      x.fetch(p.x, p.x_dtype, image * p.x_image_stride + row * p.x_row_stride + c);
    }
    __device__ __forceinline__ void values(const Params& p, int64_t, int64_t, int,
                                           float (&out)[N]) const {
      x.values(p.x_dtype, out);
    }
  };
  static __device__ __forceinline__ void keep(const Params&, int64_t, int, const float (&)[N]) {}
};

// The gradient of the norm's input is grad_x.
template <typename Packs>
struct PlainGrads {
  using T = typename Packs::T;
  static constexpr int N = Packs::N, kSums = 0;
  using Params = RmsNormModulateGradParams;
  static __host__ __device__ const RmsNormModulateGradParams& norm(const Params& g) { return g; }
  static __device__ void* partials(const Params&) { return nullptr; }

  struct Fetch {
    __device__ __forceinline__ void fetch(const Params&, int64_t, int64_t, int) {}
    __device__ __forceinline__ void store(const Params& g, int64_t image, int64_t row, int c,
                                          const float (&grad)[N]) const {
      const RmsNormModulateParams& p = g.forward;
      store_values<T>(grad, g.grad_x, p.x_dtype, (image * p.rows_per_image + row) * p.C + c);
    }
  };
};

}  // namespace

Status rms_norm_modulate_fwd(const RmsNormModulateParams& p, void* stream) {
  return with_packs(
      p, [&](int pack) { return norm_is_aligned(p, pack, kMaxThreads); },
      [&](auto packs) {
        return launch_norm_fwd<PlainRows<decltype(packs)>>(p, static_cast<cudaStream_t>(stream));
      });
}

Status rms_norm_modulate_bwd(const RmsNormModulateGradParams& g, void* stream) {
  return with_packs(
      g.forward, [&](int pack) { return norm_grads_are_aligned(g, pack); },
      [&](auto packs) {
        return launch_norm_bwd<PlainGrads<decltype(packs)>>(g, GateSums{},
                                                            static_cast<cudaStream_t>(stream));
      });
}

}  // namespace pixelgen::cuda
