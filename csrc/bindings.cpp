// The only C++ file that knows Python. Every function takes device addresses (0 for a missing
// buffer), sizes, strides in elements and dtype tags, all by keyword; `device` is a CUDA device
// index and -1 the CPU. Shapes are the Python side's.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cuda/device.h"
#include "patchify.h"
#include "qk_norm_rope.h"
#include "rms_norm_modulate.h"
#include "swiglu.h"

namespace py = pybind11;

namespace pixelgen {
namespace {

#ifdef PIXELGEN_HAS_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

void check(const char* op, Status status) {
  if (status != nullptr) throw std::runtime_error(std::string(op) + ": " + status);
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Where a call runs.
struct Launch {
  int device, num_threads;
  uintptr_t stream;
};

// Calls the op's CPU or CUDA function; a macro, since a build without CUDA has no cuda:: functions
// to name.
#ifdef PIXELGEN_HAS_CUDA
#define PIXELGEN_CALL(op, params, launch)                        \
  if (launch.device >= 0) {                                      \
    const cuda::DeviceGuard guard(launch.device);                \
    check(#op, guard.status());                                  \
    return check(#op, cuda::op(params, pointer(launch.stream))); \
  }                                                              \
  check(#op, cpu::op(params, launch.num_threads < 1 ? 1 : launch.num_threads))
#else
#define PIXELGEN_CALL(op, params, launch)                                                   \
  if (launch.device >= 0) check(#op, "this build of pixelgen_kernels has no CUDA kernels"); \
  check(#op, cpu::op(params, launch.num_threads < 1 ? 1 : launch.num_threads))
#endif

// Calls the CPU function of an op that has no CUDA function in this module, whatever was built.
#define PIXELGEN_CALL_CPU(op, params, launch)                                              \
  if (launch.device >= 0) check(#op, "the compiled module has this op for the CPU alone"); \
  check(#op, cpu::op(params, launch.num_threads < 1 ? 1 : launch.num_threads))

// --- patchify, unpatchify

template <bool kToTokens>
void patchify_binding(uintptr_t image, uintptr_t tokens, int64_t B, int64_t C, int64_t H, int64_t W,
                      int64_t patch_size, int64_t image_stride_b, int64_t image_stride_c,
                      int64_t image_stride_h, int64_t image_stride_w, int64_t tokens_stride_b,
                      int64_t tokens_stride_t, int element_size, bool channel_last, int device,
                      uintptr_t stream, int num_threads) {
  const PatchifyParams p{pointer(image),
                         pointer(tokens),
                         B,
                         C,
                         H,
                         W,
                         patch_size,
                         image_stride_b,
                         image_stride_c,
                         image_stride_h,
                         image_stride_w,
                         tokens_stride_b,
                         tokens_stride_t,
                         element_size,
                         channel_last};
  const Launch launch{device, num_threads, stream};
  if constexpr (kToTokens) {
    PIXELGEN_CALL(patchify, p, launch);
  } else {
    PIXELGEN_CALL(unpatchify, p, launch);
  }
}

template <typename Function>
void define_patchify(py::module_& m, const char* name, const char* doc, Function function) {
  m.def(name, function, doc, py::kw_only(), py::arg("image"), py::arg("tokens"), py::arg("B"),
        py::arg("C"), py::arg("H"), py::arg("W"), py::arg("patch_size"), py::arg("image_stride_b"),
        py::arg("image_stride_c"), py::arg("image_stride_h"), py::arg("image_stride_w"),
        py::arg("tokens_stride_b"), py::arg("tokens_stride_t"), py::arg("element_size"),
        py::arg("channel_last"), py::arg("device"), py::arg("stream"), py::arg("num_threads"),
        py::call_guard<py::gil_scoped_release>());
}

// --- rms_norm_modulate

RmsNormModulateParams rms_norm_modulate_params(
    uintptr_t x, uintptr_t shift, uintptr_t scale, uintptr_t weight, uintptr_t bias, uintptr_t y,
    uintptr_t mean, uintptr_t rstd, int64_t num_images, int64_t rows_per_image, int64_t C,
    int64_t x_image_stride, int64_t x_row_stride, int64_t shift_image_stride,
    int64_t shift_row_stride, int64_t scale_image_stride, int64_t scale_row_stride, int x_dtype,
    int modulation_dtype, int weight_dtype, bool per_token, bool layer_norm, double eps) {
  return {pointer(x),
          pointer(shift),
          pointer(scale),
          pointer(weight),
          pointer(bias),
          pointer(y),
          pointer(mean),
          pointer(rstd),
          num_images,
          rows_per_image,
          C,
          x_image_stride,
          x_row_stride,
          shift_image_stride,
          shift_row_stride,
          scale_image_stride,
          scale_row_stride,
          DType(x_dtype),
          DType(modulation_dtype),
          DType(weight_dtype),
          per_token,
          layer_norm,
          eps};
}

void rms_norm_modulate_fwd_binding(uintptr_t x, uintptr_t shift, uintptr_t scale, uintptr_t weight,
                                   uintptr_t bias, uintptr_t y, uintptr_t mean, uintptr_t rstd,
                                   int64_t num_images, int64_t rows_per_image, int64_t C,
                                   int64_t x_image_stride, int64_t x_row_stride,
                                   int64_t shift_image_stride, int64_t shift_row_stride,
                                   int64_t scale_image_stride, int64_t scale_row_stride,
                                   int x_dtype, int modulation_dtype, int weight_dtype,
                                   bool per_token, bool layer_norm, double eps, int device,
                                   uintptr_t stream, int num_threads) {
  const RmsNormModulateParams p = rms_norm_modulate_params(
      x, shift, scale, weight, bias, y, mean, rstd, num_images, rows_per_image, C, x_image_stride,
      x_row_stride, shift_image_stride, shift_row_stride, scale_image_stride, scale_row_stride,
      x_dtype, modulation_dtype, weight_dtype, per_token, layer_norm, eps);
  const Launch launch{device, num_threads, stream};
  PIXELGEN_CALL(rms_norm_modulate_fwd, p, launch);
}

void rms_norm_modulate_bwd_binding(uintptr_t grad_y, uintptr_t x, uintptr_t shift, uintptr_t scale,
                                   uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t rstd,
                                   uintptr_t grad_x, uintptr_t grad_shift, uintptr_t grad_scale,
                                   uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t partials,
                                   int64_t rows_per_chunk, int64_t num_images,
                                   int64_t rows_per_image, int64_t C, int64_t grad_y_image_stride,
                                   int64_t grad_y_row_stride, int64_t x_image_stride,
                                   int64_t x_row_stride, int64_t shift_image_stride,
                                   int64_t shift_row_stride, int64_t scale_image_stride,
                                   int64_t scale_row_stride, int x_dtype, int modulation_dtype,
                                   int weight_dtype, bool per_token, bool layer_norm, int device,
                                   uintptr_t stream, int num_threads) {
  const RmsNormModulateGradParams p{
      rms_norm_modulate_params(x, shift, scale, weight, bias, 0, mean, rstd, num_images,
                               rows_per_image, C, x_image_stride, x_row_stride, shift_image_stride,
                               shift_row_stride, scale_image_stride, scale_row_stride, x_dtype,
                               modulation_dtype, weight_dtype, per_token, layer_norm, 0.0),
      pointer(grad_y),
      grad_y_image_stride,
      grad_y_row_stride,
      pointer(grad_x),
      pointer(grad_shift),
      pointer(grad_scale),
      pointer(grad_weight),
      pointer(grad_bias),
      pointer(partials),
      rows_per_chunk};
  const Launch launch{device, num_threads, stream};
  PIXELGEN_CALL(rms_norm_modulate_bwd, p, launch);
}

// --- swiglu, on the CPU alone

void swiglu_fwd_binding(uintptr_t x, uintptr_t y, int64_t num_outer, int64_t num_inner, int64_t F,
                        int64_t x_outer_stride, int64_t x_inner_stride, int dtype, int device,
                        uintptr_t stream, int num_threads) {
  const SwigluParams p{pointer(x), pointer(y),     num_outer,      num_inner,
                       F,          x_outer_stride, x_inner_stride, DType(dtype)};
  const Launch launch{device, num_threads, stream};
  PIXELGEN_CALL_CPU(swiglu_fwd, p, launch);
}

void swiglu_bwd_binding(uintptr_t grad_y, uintptr_t x, uintptr_t grad_x, int64_t num_outer,
                        int64_t num_inner, int64_t F, int64_t grad_y_outer_stride,
                        int64_t grad_y_inner_stride, int64_t x_outer_stride, int64_t x_inner_stride,
                        int dtype, int device, uintptr_t stream, int num_threads) {
  const SwigluGradParams p{
      {pointer(x), nullptr, num_outer, num_inner, F, x_outer_stride, x_inner_stride, DType(dtype)},
      pointer(grad_y),
      grad_y_outer_stride,
      grad_y_inner_stride,
      pointer(grad_x)};
  const Launch launch{device, num_threads, stream};
  PIXELGEN_CALL_CPU(swiglu_bwd, p, launch);
}

// --- qk_norm_rope, on the CPU alone

QkNormRopeParams qk_norm_rope_params(uintptr_t qkv, uintptr_t q_weight, uintptr_t k_weight,
                                     uintptr_t cos, uintptr_t sin, uintptr_t q, uintptr_t k,
                                     uintptr_t v, int64_t B, int64_t T, int64_t N, int64_t D,
                                     int64_t qkv_batch_stride, int64_t qkv_token_stride,
                                     int64_t num_prefix_tokens, int qkv_dtype, int q_weight_dtype,
                                     int k_weight_dtype, int cos_dtype, int sin_dtype, double eps) {
  return {pointer(qkv),
          pointer(q_weight),
          pointer(k_weight),
          pointer(cos),
          pointer(sin),
          pointer(q),
          pointer(k),
          pointer(v),
          B,
          T,
          N,
          D,
          qkv_batch_stride,
          qkv_token_stride,
          num_prefix_tokens,
          DType(qkv_dtype),
          DType(q_weight_dtype),
          DType(k_weight_dtype),
          DType(cos_dtype),
          DType(sin_dtype),
          eps};
}

void qk_norm_rope_fwd_binding(uintptr_t qkv, uintptr_t q_weight, uintptr_t k_weight, uintptr_t cos,
                              uintptr_t sin, uintptr_t q, uintptr_t k, uintptr_t v, int64_t B,
                              int64_t T, int64_t N, int64_t D, int64_t qkv_batch_stride,
                              int64_t qkv_token_stride, int64_t num_prefix_tokens, int qkv_dtype,
                              int q_weight_dtype, int k_weight_dtype, int cos_dtype, int sin_dtype,
                              double eps, int device, uintptr_t stream, int num_threads) {
  const QkNormRopeParams p = qk_norm_rope_params(
      qkv, q_weight, k_weight, cos, sin, q, k, v, B, T, N, D, qkv_batch_stride, qkv_token_stride,
      num_prefix_tokens, qkv_dtype, q_weight_dtype, k_weight_dtype, cos_dtype, sin_dtype, eps);
  const Launch launch{device, num_threads, stream};
  PIXELGEN_CALL_CPU(qk_norm_rope_fwd, p, launch);
}

void qk_norm_rope_bwd_binding(
    uintptr_t grad_q, uintptr_t grad_k, uintptr_t grad_v, uintptr_t qkv, uintptr_t q_weight,
    uintptr_t k_weight, uintptr_t cos, uintptr_t sin, uintptr_t grad_qkv, uintptr_t grad_q_weight,
    uintptr_t grad_k_weight, uintptr_t partials, int64_t tokens_per_chunk, int64_t B, int64_t T,
    int64_t N, int64_t D, int64_t grad_q_batch_stride, int64_t grad_q_head_stride,
    int64_t grad_q_token_stride, int64_t grad_k_batch_stride, int64_t grad_k_head_stride,
    int64_t grad_k_token_stride, int64_t grad_v_batch_stride, int64_t grad_v_head_stride,
    int64_t grad_v_token_stride, int64_t qkv_batch_stride, int64_t qkv_token_stride,
    int64_t num_prefix_tokens, int qkv_dtype, int q_weight_dtype, int k_weight_dtype, int cos_dtype,
    int sin_dtype, double eps, int device, uintptr_t stream, int num_threads) {
  const QkNormRopeGradParams p{
      qk_norm_rope_params(qkv, q_weight, k_weight, cos, sin, 0, 0, 0, B, T, N, D, qkv_batch_stride,
                          qkv_token_stride, num_prefix_tokens, qkv_dtype, q_weight_dtype,
                          k_weight_dtype, cos_dtype, sin_dtype, eps),
      pointer(grad_q),
      pointer(grad_k),
      pointer(grad_v),
      {grad_q_batch_stride, grad_q_head_stride, grad_q_token_stride},
      {grad_k_batch_stride, grad_k_head_stride, grad_k_token_stride},
      {grad_v_batch_stride, grad_v_head_stride, grad_v_token_stride},
      pointer(grad_qkv),
      pointer(grad_q_weight),
      pointer(grad_k_weight),
      pointer(partials),
      tokens_per_chunk};
  const Launch launch{device, num_threads, stream};
  PIXELGEN_CALL_CPU(qk_norm_rope_bwd, p, launch);
}

// --- what was built

py::dict build_info() {
  py::dict info;
  info["version"] = PIXELGEN_VERSION;
  info["compiler"] = PIXELGEN_COMPILER;
  info["cpu_isa"] = cpu::isa();
#ifdef PIXELGEN_X86_LEVELS
  info["cpu_isas"] = py::make_tuple("baseline", "x86-64-v3", "x86-64-v4");
#else
  info["cpu_isas"] = py::make_tuple("baseline");
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = kHasCuda;
#ifdef PIXELGEN_HAS_CUDA
  info["cuda_version"] = PIXELGEN_CUDA_VERSION;
  info["cuda_archs"] = py::str(PIXELGEN_CUDA_ARCHS).attr("split")(",");
#else
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  return info;
}

}  // namespace
}  // namespace pixelgen

PYBIND11_MODULE(_C, m) {
  using namespace pixelgen;
  m.doc() = "Compiled kernels of pixelgen_kernels: raw addresses in, nothing checked.";
  m.attr("has_cuda") = kHasCuda;
  m.def("build_info", &build_info, "What was built, and the instruction set in use.");

  define_patchify(m, "patchify", "Image to tokens.", &patchify_binding<true>);
  define_patchify(m, "unpatchify", "Tokens to image.", &patchify_binding<false>);

  m.def("rms_norm_modulate_fwd", &rms_norm_modulate_fwd_binding, "y, mean and rstd.", py::kw_only(),
        py::arg("x"), py::arg("shift"), py::arg("scale"), py::arg("weight"), py::arg("bias"),
        py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("num_images"),
        py::arg("rows_per_image"), py::arg("C"), py::arg("x_image_stride"), py::arg("x_row_stride"),
        py::arg("shift_image_stride"), py::arg("shift_row_stride"), py::arg("scale_image_stride"),
        py::arg("scale_row_stride"), py::arg("x_dtype"), py::arg("modulation_dtype"),
        py::arg("weight_dtype"), py::arg("per_token"), py::arg("layer_norm"), py::arg("eps"),
        py::arg("device"), py::arg("stream"), py::arg("num_threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_modulate_bwd", &rms_norm_modulate_bwd_binding, "Gradients of every input.",
        py::kw_only(), py::arg("grad_y"), py::arg("x"), py::arg("shift"), py::arg("scale"),
        py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("rstd"), py::arg("grad_x"),
        py::arg("grad_shift"), py::arg("grad_scale"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::arg("partials"), py::arg("rows_per_chunk"), py::arg("num_images"),
        py::arg("rows_per_image"), py::arg("C"), py::arg("grad_y_image_stride"),
        py::arg("grad_y_row_stride"), py::arg("x_image_stride"), py::arg("x_row_stride"),
        py::arg("shift_image_stride"), py::arg("shift_row_stride"), py::arg("scale_image_stride"),
        py::arg("scale_row_stride"), py::arg("x_dtype"), py::arg("modulation_dtype"),
        py::arg("weight_dtype"), py::arg("per_token"), py::arg("layer_norm"), py::arg("device"),
        py::arg("stream"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def("swiglu_fwd", &swiglu_fwd_binding, "y, on the CPU.", py::kw_only(), py::arg("x"),
        py::arg("y"), py::arg("num_outer"), py::arg("num_inner"), py::arg("F"),
        py::arg("x_outer_stride"), py::arg("x_inner_stride"), py::arg("dtype"), py::arg("device"),
        py::arg("stream"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
  m.def("swiglu_bwd", &swiglu_bwd_binding, "grad_x, on the CPU.", py::kw_only(), py::arg("grad_y"),
        py::arg("x"), py::arg("grad_x"), py::arg("num_outer"), py::arg("num_inner"), py::arg("F"),
        py::arg("grad_y_outer_stride"), py::arg("grad_y_inner_stride"), py::arg("x_outer_stride"),
        py::arg("x_inner_stride"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
        py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
  m.def("qk_norm_rope_fwd", &qk_norm_rope_fwd_binding, "q, k and v, on the CPU.", py::kw_only(),
        py::arg("qkv"), py::arg("q_weight"), py::arg("k_weight"), py::arg("cos"), py::arg("sin"),
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("B"), py::arg("T"), py::arg("N"),
        py::arg("D"), py::arg("qkv_batch_stride"), py::arg("qkv_token_stride"),
        py::arg("num_prefix_tokens"), py::arg("qkv_dtype"), py::arg("q_weight_dtype"),
        py::arg("k_weight_dtype"), py::arg("cos_dtype"), py::arg("sin_dtype"), py::arg("eps"),
        py::arg("device"), py::arg("stream"), py::arg("num_threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "qk_norm_rope_bwd", &qk_norm_rope_bwd_binding,
      "Gradients of qkv and of both weights, on the CPU.", py::kw_only(), py::arg("grad_q"),
      py::arg("grad_k"), py::arg("grad_v"), py::arg("qkv"), py::arg("q_weight"),
      py::arg("k_weight"), py::arg("cos"), py::arg("sin"), py::arg("grad_qkv"),
      py::arg("grad_q_weight"), py::arg("grad_k_weight"), py::arg("partials"),
      py::arg("tokens_per_chunk"), py::arg("B"), py::arg("T"), py::arg("N"), py::arg("D"),
      py::arg("grad_q_batch_stride"), py::arg("grad_q_head_stride"), py::arg("grad_q_token_stride"),
      py::arg("grad_k_batch_stride"), py::arg("grad_k_head_stride"), py::arg("grad_k_token_stride"),
      py::arg("grad_v_batch_stride"), py::arg("grad_v_head_stride"), py::arg("grad_v_token_stride"),
      py::arg("qkv_batch_stride"), py::arg("qkv_token_stride"), py::arg("num_prefix_tokens"),
      py::arg("qkv_dtype"), py::arg("q_weight_dtype"), py::arg("k_weight_dtype"),
      py::arg("cos_dtype"), py::arg("sin_dtype"), py::arg("eps"), py::arg("device"),
      py::arg("stream"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}
