// Picks, once, the widest instruction set that was compiled and that this processor runs.
#include "dispatch.h"

#include "../cosine_distance.h"
#include "../flow_matching_loss.h"
#include "../gate_residual_norm_modulate.h"
#include "../lpips_distance.h"
#include "../noise_patchify.h"
#include "../patchify.h"
#include "../philox.h"
#include "../qk_norm_rope.h"
#include "../rms_norm_modulate.h"
#include "../swiglu.h"

namespace pixelgen::cpu {
namespace {

enum class Isa { kBaseline, kV3, kV4 };

Isa detect() {
#ifdef PIXELGEN_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::kV4 : v3 ? Isa::kV3 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

const Isa kIsa = detect();

}  // namespace

const char* isa() {
  switch (kIsa) {
    case Isa::kV4:
      return "x86-64-v4";
    case Isa::kV3:
      return "x86-64-v3";
    default:
      return "baseline";
  }
}

#ifdef PIXELGEN_X86_LEVELS
#define PIXELGEN_DISPATCH(op, Params)           \
  namespace baseline {                          \
  Status op(const Params&, int);                \
  }                                             \
  namespace x86_64_v3 {                         \
  Status op(const Params&, int);                \
  }                                             \
  namespace x86_64_v4 {                         \
  Status op(const Params&, int);                \
  }                                             \
  Status op(const Params& p, int num_threads) { \
    switch (kIsa) {                             \
      case Isa::kV4:                            \
        return x86_64_v4::op(p, num_threads);   \
      case Isa::kV3:                            \
        return x86_64_v3::op(p, num_threads);   \
      default:                                  \
        return baseline::op(p, num_threads);    \
    }                                           \
  }
#else
#define PIXELGEN_DISPATCH(op, Params) \
  namespace baseline {                \
  Status op(const Params&, int);      \
  }                                   \
  Status op(const Params& p, int num_threads) { return baseline::op(p, num_threads); }
#endif

PIXELGEN_DISPATCH(patchify, PatchifyParams)
PIXELGEN_DISPATCH(unpatchify, PatchifyParams)
PIXELGEN_DISPATCH(rms_norm_modulate_fwd, RmsNormModulateParams)
PIXELGEN_DISPATCH(rms_norm_modulate_bwd, RmsNormModulateGradParams)
PIXELGEN_DISPATCH(gate_residual_norm_modulate_fwd, GateResidualNormModulateParams)
PIXELGEN_DISPATCH(gate_residual_norm_modulate_bwd, GateResidualNormModulateGradParams)
PIXELGEN_DISPATCH(swiglu_fwd, SwigluParams)
PIXELGEN_DISPATCH(swiglu_bwd, SwigluGradParams)
PIXELGEN_DISPATCH(qk_norm_rope_fwd, QkNormRopeParams)
PIXELGEN_DISPATCH(qk_norm_rope_bwd, QkNormRopeGradParams)
PIXELGEN_DISPATCH(philox_uniform, PhiloxParams)
PIXELGEN_DISPATCH(philox_normal, PhiloxParams)
PIXELGEN_DISPATCH(noise_patchify, NoisePatchifyParams)
PIXELGEN_DISPATCH(flow_matching_loss_fwd, FlowMatchingLossParams)
PIXELGEN_DISPATCH(flow_matching_loss_bwd, FlowMatchingLossGradParams)
PIXELGEN_DISPATCH(lpips_distance_fwd, LpipsDistanceParams)
PIXELGEN_DISPATCH(lpips_distance_bwd, LpipsDistanceGradParams)
PIXELGEN_DISPATCH(cosine_distance_fwd, CosineDistanceParams)
PIXELGEN_DISPATCH(cosine_distance_bwd, CosineDistanceGradParams)

}  // namespace pixelgen::cpu
