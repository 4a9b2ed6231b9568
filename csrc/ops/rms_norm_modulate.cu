// Bound by bytes: x is read once and y written once (backward: x and grad_y read, grad_x written).
// The kernels are those of norm_fwd.cuh and norm_bwd.cuh.
#include "../common/norm_bwd.cuh"
#include "../common/norm_fwd.cuh"
#include "rms_norm_modulate.h"

namespace pixelgen::cuda {
namespace {

// The rows of x, as they are.
template <typename Packs>
struct PlainRows {
  using T = typename Packs::T;
  static constexpr int N = Packs::N;
  struct Op {};

  struct Fetch {
    Fetched<T, N> x;

    __device__ __forceinline__ void fetch(const NormFwd& p, const Op&, int64_t image, int64_t row,
                                          int c) {
      x.fetch(p.x, p.x.offset(image, row) + c);
    }
    __device__ __forceinline__ void values(const NormFwd& p, const Op&, int64_t, int64_t, int,
                                           float (&out)[N]) const {
      x.values(p.x.dtype, out);
    }
  };
  static __device__ __forceinline__ void keep(const NormFwd&, const Op&, int64_t, int,
                                              const float (&)[N]) {}
};

// The gradient of the norm's input is grad_x.
template <typename Packs>
struct PlainGrads {
  using T = typename Packs::T;
  static constexpr int N = Packs::N, kSums = 0;
  struct Op {};

  struct Fetch {
    __device__ __forceinline__ void fetch(const NormBwd&, const Op&, int64_t, int64_t, int) {}
    __device__ __forceinline__ void store(const NormBwd& p, const Op&, int64_t image, int64_t row,
                                          int c, const float (&grad)[N]) const {
      store_values<T>(grad, p.grad_x, (image * p.rows_per_image() + row) * p.width() + c);
    }
  };
};

}  // namespace

Status rms_norm_modulate_fwd(const RmsNormModulateFwd& a, const Place& place) {
  NormFwd p;
  const Status status = make_norm(a, &p);
  if (status != nullptr) return status;
  const auto is_aligned = [&](int pack) {
    return norm_is_packed(p, pack, kMaxThreads) && is_packed(p.y, pack, p.width());
  };
  return with_packs(p.x.dtype, is_aligned, [&](auto packs) {
    return launch_norm_fwd<PlainRows<decltype(packs)>>(p, {}, place);
  });
}

Status rms_norm_modulate_bwd(const RmsNormModulateBwd& a, const Place& place) {
  NormBwd p;
  const Status status = make_norm(a, kBackwardChunks, place, &p);
  if (status != nullptr) return status;
  const auto is_aligned = [&](int pack) { return norm_grads_are_packed(p, pack); };
  return with_packs(p.x.dtype, is_aligned, [&](auto packs) {
    return launch_norm_bwd<PlainGrads<decltype(packs)>>(p, {}, Dense{}, place);
  });
}

PIXELGEN_OPS(rms_norm_modulate, PIXELGEN_OP(rms_norm_modulate_fwd),
             PIXELGEN_OP(rms_norm_modulate_bwd))

}  // namespace pixelgen::cuda
