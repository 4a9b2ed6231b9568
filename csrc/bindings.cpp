// The only C++ file that knows Python. Every function takes the fields of its op's struct by
// keyword: device addresses (0 for a missing buffer), sizes, strides in elements and dtype tags;
// and where it runs: `device`, a CUDA device index or -1 for the CPU, `stream` and `num_threads`.
// Shapes are the Python side's.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cosine_distance.h"
#include "cpu/dispatch.h"
#include "cuda/device.h"
#include "flow_matching_loss.h"
#include "gate_residual_norm_modulate.h"
#include "lpips_distance.h"
#include "noise_patchify.h"
#include "patchify.h"
#include "philox.h"
#include "qk_norm_rope.h"
#include "rms_norm_modulate.h"
#include "swiglu.h"

namespace py = pybind11;

namespace pixelgen {
namespace {

#ifdef PIXELGEN_HAS_CUDA
constexpr bool kHasCuda = true;
#define PIXELGEN_CUDA_FUNCTION(op) &cuda::op
#else
constexpr bool kHasCuda = false;
#define PIXELGEN_CUDA_FUNCTION(op) nullptr
#endif

// --- keywords to fields

enum class Kind { kPointer, kInt64, kInt, kBool, kDouble };

// A member of a struct, by its offset.
struct Field {
  const char* name;
  Kind kind;
  size_t offset;
};
using Fields = std::vector<Field>;

template <typename T>
constexpr Kind kind_of() {
  if constexpr (std::is_pointer_v<T>) return Kind::kPointer;
  if constexpr (std::is_same_v<T, int64_t>) return Kind::kInt64;
  if constexpr (std::is_same_v<T, int> || std::is_same_v<T, DType>) return Kind::kInt;
  if constexpr (std::is_same_v<T, bool>) return Kind::kBool;
  if constexpr (std::is_same_v<T, double>) return Kind::kDouble;
}

#define NAMED_FIELD(Params, member, name) \
  Field { name, kind_of<decltype(std::declval<Params>().member)>(), offsetof(Params, member) }
#define FIELD(Params, member) NAMED_FIELD(Params, member, #member)

// Both lists; `inner` belongs to the struct that lies at `offset` of the one of `outer`.
Fields with_nested(Fields outer, const Fields& inner, size_t offset) {
  for (const Field& field : inner) outer.push_back({field.name, field.kind, field.offset + offset});
  return outer;
}

Fields operator+(Fields fields, const Fields& more) {
  return with_nested(std::move(fields), more, 0);
}

void assign(PyObject* value, Kind kind, void* member) {
  switch (kind) {
    case Kind::kPointer:
      *static_cast<void**>(member) =
          reinterpret_cast<void*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value)));
      return;
    case Kind::kInt64:
      *static_cast<int64_t*>(member) = PyLong_AsLongLong(value);
      return;
    case Kind::kInt:
      *static_cast<int*>(member) = static_cast<int>(PyLong_AsLong(value));
      return;
    case Kind::kBool:
      *static_cast<bool*>(member) = PyObject_IsTrue(value) == 1;
      return;
    case Kind::kDouble:
      *static_cast<double*>(member) = PyFloat_AsDouble(value);
      return;
  }
}

// Where a call runs.
struct Launch {
  int device;
  void* stream;
  int num_threads;
};

const Fields& launch_fields() {
  static const Fields fields{FIELD(Launch, device), FIELD(Launch, stream),
                             FIELD(Launch, num_threads)};
  return fields;
}

// The names of a list as Python strings, made once.
std::vector<py::object> names_of(const Fields& fields) {
  std::vector<py::object> names;
  for (const Field& field : fields) names.emplace_back(py::str(field.name));
  return names;
}

void read(const char* op, const py::kwargs& arguments, const Fields& fields,
          const std::vector<py::object>& names, void* target) {
  for (size_t i = 0; i < fields.size(); ++i) {
    PyObject* value = PyDict_GetItemWithError(arguments.ptr(), names[i].ptr());
    if (value == nullptr) {
      if (PyErr_Occurred()) throw py::error_already_set();
      throw py::type_error(std::string(op) + ": argument " + fields[i].name + " is missing");
    }
    assign(value, fields[i].kind, static_cast<char*>(target) + fields[i].offset);
  }
  if (PyErr_Occurred()) throw py::error_already_set();  // a value of another type, or out of range
}

// --- ops

template <typename Params>
using CpuFunction = Status (*)(const Params&, int num_threads);
template <typename Params>
using CudaFunction = Status (*)(const Params&, void* stream);

// Runs the op with the GIL released. `on_cuda` is null where this module has no such function.
template <typename Params>
Status run(const Params& params, const Launch& launch, CpuFunction<Params> on_cpu,
           CudaFunction<Params> on_cuda) {
  const py::gil_scoped_release released;
  if (launch.device < 0) return on_cpu(params, launch.num_threads < 1 ? 1 : launch.num_threads);
#ifdef PIXELGEN_HAS_CUDA
  if (on_cuda != nullptr) {
    const cuda::DeviceGuard guard(launch.device);
    return guard.status() != nullptr ? guard.status() : on_cuda(params, launch.stream);
  }
#endif
  return kHasCuda ? "the compiled module has this op for the CPU alone"
                  : "this build of pixelgen_kernels has no CUDA kernels";
}

template <typename Params>
void define(py::module_& m, const char* op, const char* doc, const Fields& fields,
            CpuFunction<Params> on_cpu, CudaFunction<Params> on_cuda = nullptr) {
  static_assert(std::is_standard_layout_v<Params>, "fields are found by their offsets");
  const auto function = [=, names = names_of(fields),
                         launch_names = names_of(launch_fields())](const py::kwargs& arguments) {
    Params params{};
    Launch launch{};
    read(op, arguments, fields, names, &params);
    read(op, arguments, launch_fields(), launch_names, &launch);
    if (size_t(py::len(arguments)) != names.size() + launch_names.size()) {
      throw py::type_error(std::string(op) + ": there is an argument of an unknown name");
    }
    const Status status = run(params, launch, on_cpu, on_cuda);
    if (status != nullptr) throw std::runtime_error(std::string(op) + ": " + status);
  };
  m.def(op, function, doc);
}

void define_patchify(py::module_& m) {
  using P = PatchifyParams;
  const Fields fields{FIELD(P, image),
                      FIELD(P, tokens),
                      FIELD(P, B),
                      FIELD(P, C),
                      FIELD(P, H),
                      FIELD(P, W),
                      NAMED_FIELD(P, P, "patch_size"),
                      FIELD(P, image_stride_b),
                      FIELD(P, image_stride_c),
                      FIELD(P, image_stride_h),
                      FIELD(P, image_stride_w),
                      FIELD(P, tokens_stride_b),
                      FIELD(P, tokens_stride_t),
                      FIELD(P, element_size),
                      FIELD(P, channel_last)};
  define<P>(m, "patchify", "Image to tokens.", fields, &cpu::patchify,
            PIXELGEN_CUDA_FUNCTION(patchify));
  define<P>(m, "unpatchify", "Tokens to image.", fields, &cpu::unpatchify,
            PIXELGEN_CUDA_FUNCTION(unpatchify));
}

// Fields of RmsNormModulateParams that forward and backward read.
Fields norm_fields() {
  using P = RmsNormModulateParams;
  return {FIELD(P, x),
          FIELD(P, shift),
          FIELD(P, scale),
          FIELD(P, weight),
          FIELD(P, bias),
          FIELD(P, mean),
          FIELD(P, rstd),
          FIELD(P, num_images),
          FIELD(P, rows_per_image),
          FIELD(P, C),
          FIELD(P, x_image_stride),
          FIELD(P, x_row_stride),
          FIELD(P, shift_image_stride),
          FIELD(P, shift_row_stride),
          FIELD(P, scale_image_stride),
          FIELD(P, scale_row_stride),
          FIELD(P, x_dtype),
          FIELD(P, modulation_dtype),
          FIELD(P, weight_dtype),
          FIELD(P, per_token),
          FIELD(P, layer_norm)};
}

// Fields that RmsNormModulateGradParams has besides; grad_y is left to the op, which names it.
Fields norm_grad_fields() {
  using G = RmsNormModulateGradParams;
  const Fields grads{FIELD(G, grad_x),        FIELD(G, grad_shift), FIELD(G, grad_scale),
                     FIELD(G, grad_weight),   FIELD(G, grad_bias),  FIELD(G, partials),
                     FIELD(G, rows_per_chunk)};
  return with_nested(grads, norm_fields(), offsetof(G, forward));
}

void define_rms_norm_modulate(py::module_& m) {
  using P = RmsNormModulateParams;
  using G = RmsNormModulateGradParams;
  const Fields grads{FIELD(G, grad_y), FIELD(G, grad_y_image_stride), FIELD(G, grad_y_row_stride)};
  define<P>(m, "rms_norm_modulate_fwd", "y, mean and rstd.",
            norm_fields() + Fields{FIELD(P, y), FIELD(P, eps)}, &cpu::rms_norm_modulate_fwd,
            PIXELGEN_CUDA_FUNCTION(rms_norm_modulate_fwd));
  define<G>(m, "rms_norm_modulate_bwd", "Gradients of every input.", grads + norm_grad_fields(),
            &cpu::rms_norm_modulate_bwd, PIXELGEN_CUDA_FUNCTION(rms_norm_modulate_bwd));
}

void define_gate_residual_norm_modulate(py::module_& m) {
  using P = GateResidualNormModulateParams;
  using G = GateResidualNormModulateGradParams;
  using B = GatedBranch;
  const Fields branch{FIELD(B, y),
                      FIELD(B, gate),
                      FIELD(B, y_image_stride),
                      FIELD(B, y_row_stride),
                      FIELD(B, gate_image_stride),
                      FIELD(B, gate_row_stride),
                      FIELD(B, y_dtype),
                      FIELD(B, gate_dtype),
                      FIELD(B, gate_per_token)};
  const Fields outputs{FIELD(P, residual), NAMED_FIELD(P, norm.y, "normed"),
                       NAMED_FIELD(P, norm.eps, "eps")};
  const Fields grads{NAMED_FIELD(G, norm.grad_y, "grad_normed"),
                     NAMED_FIELD(G, norm.grad_y_image_stride, "grad_normed_image_stride"),
                     NAMED_FIELD(G, norm.grad_y_row_stride, "grad_normed_row_stride"),
                     FIELD(G, grad_residual),
                     FIELD(G, grad_residual_image_stride),
                     FIELD(G, grad_residual_row_stride),
                     FIELD(G, grad_y),
                     FIELD(G, grad_gate),
                     FIELD(G, gate_partials)};
  const Fields forward = with_nested(outputs, norm_fields(), offsetof(P, norm));
  const Fields backward = with_nested(grads, norm_grad_fields(), offsetof(G, norm));
  define<P>(m, "gate_residual_norm_modulate_fwd", "residual, normed, mean and rstd.",
            with_nested(forward, branch, offsetof(P, branch)),
            &cpu::gate_residual_norm_modulate_fwd,
            PIXELGEN_CUDA_FUNCTION(gate_residual_norm_modulate_fwd));
  define<G>(m, "gate_residual_norm_modulate_bwd", "Gradients of every input; x is the residual.",
            with_nested(backward, branch, offsetof(G, branch)),
            &cpu::gate_residual_norm_modulate_bwd,
            PIXELGEN_CUDA_FUNCTION(gate_residual_norm_modulate_bwd));
}

void define_swiglu(py::module_& m) {
  using P = SwigluParams;
  using G = SwigluGradParams;
  const Fields shared{FIELD(P, x),    FIELD(P, num_outer),      FIELD(P, num_inner),
                      FIELD(P, F),    FIELD(P, x_outer_stride), FIELD(P, x_inner_stride),
                      FIELD(P, dtype)};
  const Fields grads{FIELD(G, grad_y), FIELD(G, grad_y_outer_stride), FIELD(G, grad_y_inner_stride),
                     FIELD(G, grad_x)};
  define<P>(m, "swiglu_fwd", "y, on the CPU.", shared + Fields{FIELD(P, y)}, &cpu::swiglu_fwd);
  define<G>(m, "swiglu_bwd", "grad_x, on the CPU.",
            with_nested(grads, shared, offsetof(G, forward)), &cpu::swiglu_bwd);
}

void define_qk_norm_rope(py::module_& m) {
  using P = QkNormRopeParams;
  using G = QkNormRopeGradParams;
  const Fields shared{FIELD(P, qkv),
                      FIELD(P, q_weight),
                      FIELD(P, k_weight),
                      FIELD(P, cos),
                      FIELD(P, sin),
                      FIELD(P, B),
                      FIELD(P, T),
                      FIELD(P, N),
                      FIELD(P, D),
                      FIELD(P, qkv_batch_stride),
                      FIELD(P, qkv_token_stride),
                      FIELD(P, num_prefix_tokens),
                      FIELD(P, qkv_dtype),
                      FIELD(P, q_weight_dtype),
                      FIELD(P, k_weight_dtype),
                      FIELD(P, cos_dtype),
                      FIELD(P, sin_dtype),
                      FIELD(P, eps)};
  const Fields grads{FIELD(G, grad_q),
                     FIELD(G, grad_k),
                     FIELD(G, grad_v),
                     NAMED_FIELD(G, grad_q_strides.batch, "grad_q_batch_stride"),
                     NAMED_FIELD(G, grad_q_strides.head, "grad_q_head_stride"),
                     NAMED_FIELD(G, grad_q_strides.token, "grad_q_token_stride"),
                     NAMED_FIELD(G, grad_k_strides.batch, "grad_k_batch_stride"),
                     NAMED_FIELD(G, grad_k_strides.head, "grad_k_head_stride"),
                     NAMED_FIELD(G, grad_k_strides.token, "grad_k_token_stride"),
                     NAMED_FIELD(G, grad_v_strides.batch, "grad_v_batch_stride"),
                     NAMED_FIELD(G, grad_v_strides.head, "grad_v_head_stride"),
                     NAMED_FIELD(G, grad_v_strides.token, "grad_v_token_stride"),
                     FIELD(G, grad_qkv),
                     FIELD(G, grad_q_weight),
                     FIELD(G, grad_k_weight),
                     FIELD(G, partials),
                     FIELD(G, tokens_per_chunk)};
  define<P>(m, "qk_norm_rope_fwd", "q, k and v, on the CPU.",
            shared + Fields{FIELD(P, q), FIELD(P, k), FIELD(P, v)}, &cpu::qk_norm_rope_fwd);
  define<G>(m, "qk_norm_rope_bwd", "Gradients of qkv and of both weights, on the CPU.",
            with_nested(grads, shared, offsetof(G, forward)), &cpu::qk_norm_rope_bwd);
}

void define_philox(py::module_& m) {
  using P = PhiloxParams;
  const Fields fields{
      FIELD(P, sample_index),        FIELD(P, out),  FIELD(P, B),    FIELD(P, count),
      FIELD(P, sample_index_stride), FIELD(P, seed), FIELD(P, step), FIELD(P, stream_index)};
  define<P>(m, "philox_uniform", "Uniform numbers.", fields, &cpu::philox_uniform,
            PIXELGEN_CUDA_FUNCTION(philox_uniform));
  define<P>(m, "philox_normal", "Standard normal numbers.", fields, &cpu::philox_normal,
            PIXELGEN_CUDA_FUNCTION(philox_normal));
}

void define_noise_patchify(py::module_& m) {
  using P = NoisePatchifyParams;
  const Fields fields{FIELD(P, image),
                      FIELD(P, noise),
                      FIELD(P, t),
                      FIELD(P, sample_index),
                      FIELD(P, tokens),
                      FIELD(P, clean),
                      FIELD(P, B),
                      FIELD(P, C),
                      FIELD(P, H),
                      FIELD(P, W),
                      NAMED_FIELD(P, P, "patch_size"),
                      FIELD(P, image_stride_b),
                      FIELD(P, image_stride_c),
                      FIELD(P, image_stride_h),
                      FIELD(P, image_stride_w),
                      FIELD(P, noise_stride_b),
                      FIELD(P, noise_stride_c),
                      FIELD(P, noise_stride_h),
                      FIELD(P, noise_stride_w),
                      FIELD(P, t_stride),
                      FIELD(P, sample_index_stride),
                      FIELD(P, seed),
                      FIELD(P, step),
                      FIELD(P, noise_scale),
                      FIELD(P, image_is_uint8),
                      FIELD(P, image_dtype),
                      FIELD(P, noise_dtype),
                      FIELD(P, t_dtype),
                      FIELD(P, out_dtype),
                      FIELD(P, channel_last),
                      FIELD(P, clean_channel_last)};
  define<P>(m, "noise_patchify", "Tokens of x_t, and of x where `clean` is not 0.", fields,
            &cpu::noise_patchify, PIXELGEN_CUDA_FUNCTION(noise_patchify));
}

void define_flow_matching_loss(py::module_& m) {
  using P = FlowMatchingLossParams;
  using G = FlowMatchingLossGradParams;
  const Fields shared{FIELD(P, x_pred),
                      FIELD(P, x),
                      FIELD(P, t),
                      FIELD(P, elements_per_chunk),
                      FIELD(P, B),
                      FIELD(P, T),
                      FIELD(P, D),
                      FIELD(P, x_pred_stride_b),
                      FIELD(P, x_pred_stride_t),
                      FIELD(P, x_pred_stride_d),
                      FIELD(P, x_stride_b),
                      FIELD(P, x_stride_t),
                      FIELD(P, x_stride_d),
                      FIELD(P, t_stride),
                      FIELD(P, t_eps),
                      FIELD(P, x_pred_dtype),
                      FIELD(P, x_dtype),
                      FIELD(P, t_dtype)};
  const Fields grads{FIELD(G, grad_loss), FIELD(G, grad_loss_stride), FIELD(G, grad_loss_dtype),
                     FIELD(G, grad_x_pred)};
  define<P>(m, "flow_matching_loss_fwd", "The loss of each sample.",
            shared + Fields{FIELD(P, loss), FIELD(P, partials)}, &cpu::flow_matching_loss_fwd,
            PIXELGEN_CUDA_FUNCTION(flow_matching_loss_fwd));
  define<G>(m, "flow_matching_loss_bwd", "grad_x_pred.",
            with_nested(grads, shared, offsetof(G, forward)), &cpu::flow_matching_loss_bwd,
            PIXELGEN_CUDA_FUNCTION(flow_matching_loss_bwd));
}

void define_lpips_distance(py::module_& m) {
  using P = LpipsDistanceParams;
  using G = LpipsDistanceGradParams;
  const Fields shared{FIELD(P, pred),
                      FIELD(P, target),
                      FIELD(P, weight),
                      FIELD(P, statistics),
                      FIELD(P, positions_per_chunk),
                      FIELD(P, B),
                      FIELD(P, C),
                      FIELD(P, H),
                      FIELD(P, W),
                      FIELD(P, pred_stride_b),
                      FIELD(P, pred_stride_c),
                      FIELD(P, pred_stride_h),
                      FIELD(P, pred_stride_w),
                      FIELD(P, target_stride_b),
                      FIELD(P, target_stride_c),
                      FIELD(P, target_stride_h),
                      FIELD(P, target_stride_w),
                      FIELD(P, weight_stride),
                      FIELD(P, eps),
                      FIELD(P, pred_dtype),
                      FIELD(P, target_dtype),
                      FIELD(P, weight_dtype)};
  const Fields grads{FIELD(G, grad_distance),       FIELD(G, grad_distance_stride),
                     FIELD(G, grad_distance_dtype), FIELD(G, grad_pred),
                     FIELD(G, grad_pred_stride_b),  FIELD(G, grad_pred_stride_c),
                     FIELD(G, grad_pred_stride_h),  FIELD(G, grad_pred_stride_w)};
  define<P>(m, "lpips_distance_fwd", "The distance of each sample, and statistics.",
            shared + Fields{FIELD(P, distance), FIELD(P, partials)}, &cpu::lpips_distance_fwd,
            PIXELGEN_CUDA_FUNCTION(lpips_distance_fwd));
  define<G>(m, "lpips_distance_bwd", "grad_pred.", with_nested(grads, shared, offsetof(G, forward)),
            &cpu::lpips_distance_bwd, PIXELGEN_CUDA_FUNCTION(lpips_distance_bwd));
}

void define_cosine_distance(py::module_& m) {
  using P = CosineDistanceParams;
  using G = CosineDistanceGradParams;
  const Fields shared{FIELD(P, pred),
                      FIELD(P, target),
                      FIELD(P, statistics),
                      FIELD(P, tokens_per_chunk),
                      FIELD(P, B),
                      FIELD(P, T),
                      FIELD(P, D),
                      FIELD(P, pred_stride_b),
                      FIELD(P, pred_stride_t),
                      FIELD(P, pred_stride_d),
                      FIELD(P, target_stride_b),
                      FIELD(P, target_stride_t),
                      FIELD(P, target_stride_d),
                      FIELD(P, eps),
                      FIELD(P, pred_dtype),
                      FIELD(P, target_dtype)};
  const Fields grads{FIELD(G, grad_distance), FIELD(G, grad_distance_stride),
                     FIELD(G, grad_distance_dtype), FIELD(G, grad_pred), FIELD(G, grad_target)};
  define<P>(m, "cosine_distance_fwd", "The distance of each sample, and statistics.",
            shared + Fields{FIELD(P, distance), FIELD(P, partials)}, &cpu::cosine_distance_fwd,
            PIXELGEN_CUDA_FUNCTION(cosine_distance_fwd));
  define<G>(m, "cosine_distance_bwd", "grad_pred and grad_target.",
            with_nested(grads, shared, offsetof(G, forward)), &cpu::cosine_distance_bwd,
            PIXELGEN_CUDA_FUNCTION(cosine_distance_bwd));
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
  define_patchify(m);
  define_rms_norm_modulate(m);
  define_gate_residual_norm_modulate(m);
  define_swiglu(m);
  define_qk_norm_rope(m);
  define_philox(m);
  define_noise_patchify(m);
  define_flow_matching_loss(m);
  define_lpips_distance(m);
  define_cosine_distance(m);
}
