// What the ops that end in a norm with shift and scale share, on the CPU and on a GPU:
//
//   n = (x - mean) * rstd                          mean = 0 for the rms norm
//   y = (n * weight + bias) * (1 + scale) + shift
//
// Statistics and arithmetic in fp32 (fp64 for fp64 x): the "stats dtype" below.
#pragma once

#include "op.h"

namespace pixelgen {

enum class Norm { kRms, kLayer };
PIXELGEN_WORDS(Norm, "rms", "layer")

// Arguments of every op, forward and backward.
struct NormArguments {
  PerSample<Need::kOptional> shift, scale;  // (B, C) or (B, T, C), of one shape and dtype
  Optional<1> weight, bias;                 // (C,), dense, of one dtype
  Dense mean, rstd;                         // of every row, stats dtype; no mean of the rms norm
  Norm norm;
};

// Dense gradients, of the shape and dtype of what they are of; of size 0 where that is None.
struct NormGrads {
  Dense grad_x, grad_shift, grad_scale, grad_weight, grad_bias;
};

// The rows that are normalised. Those of an image share shift and scale, unless these are per row;
// without shift and scale one image may hold all rows.
struct NormRows : NormArguments {
  View<3> x;  // (images, rows of an image, C)

  PIXELGEN_MEMBER int64_t num_images() const { return x.size[0]; }
  PIXELGEN_MEMBER int64_t rows_per_image() const { return x.size[1]; }
  PIXELGEN_MEMBER int64_t width() const { return x.size[2]; }
  PIXELGEN_MEMBER bool is_layer_norm() const { return norm == Norm::kLayer; }
  PIXELGEN_MEMBER bool has_shared_modulation() const {
    return scale.data != nullptr && !scale.per_row;
  }
  PIXELGEN_MEMBER DType stats_dtype() const {
    return x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }
};

struct NormFwd : NormRows {
  Dense y;  // as x
  double eps;
};

// Gradients that sum over rows go through one partial sum per chunk of rows and a second pass, so
// their bits depend on rows_per_chunk alone and not on how many threads or blocks run.
struct NormBwd : NormRows, NormGrads {
  View<3> grad_y;  // as x
  int64_t rows_per_chunk;
  void* partials;      // (chunks, 2, C) stats dtype, or null
  void* own_partials;  // (chunks, C): of a sum that the op adds, or null
};

// Backward cuts its rows into about so many chunks, but into fewer where the partial sums of a
// chunk would take more than 1 / grads_per_sum of the gradients that its rows write. An image is
// one at least.
struct ChunkRule {
  int64_t chunks, grads_per_sum, max_rows;
};

namespace {

inline Status check_norm(const NormRows& n) {
  const int64_t B = n.num_images(), T = n.rows_per_image(), C = n.width();
  if (C < 1 || C > kMaxWidth) return "x must have between 1 and 8192 channels";
  if (B * T == 0) return "x must have rows";
  if (!n.shift.fits(B, n.shift.per_row ? T : 1, C)) return "shift must have a row of C per sample";
  if ((n.scale.data == nullptr) != (n.shift.data == nullptr) || n.scale.dtype != n.shift.dtype ||
      n.scale.per_row != n.shift.per_row || !n.scale.fits(B, n.scale.per_row ? T : 1, C))
    return "scale must be as shift";
  const Optional<1>* vectors[] = {&n.weight, &n.bias};
  for (const Optional<1>* vector : vectors) {
    if (!vector->fits(C) || (vector->data != nullptr && C > 1 && vector->stride[0] != 1))
      return "weight and bias must be dense, of C elements";
  }
  if (n.bias.data != nullptr && (n.weight.data == nullptr || n.bias.dtype != n.weight.dtype))
    return "bias must be as weight";
  if (!n.mean.holds(n.is_layer_norm() ? B * T : 0, n.stats_dtype()))
    return "mean must have one number per row for the layer norm, of the stats dtype";
  return n.rstd.holds(B * T, n.stats_dtype()) ? nullptr : "rstd must have one number per row";
}

inline Status check_norm_fwd(const NormFwd& n) {
  const Status status = check_norm(n);
  if (status != nullptr) return status;
  const int64_t count = n.num_images() * n.rows_per_image() * n.width();
  return n.y.holds(count, n.x.dtype) ? nullptr : "outputs must be as x";
}

// Gradients of outputs, of which some may be None, are as x.
inline bool is_upstream_of(const View<3>& x, const View<3>& grad) {
  return grad.fits(x.size[0], x.size[1], x.size[2]) &&
         (grad.data == nullptr || grad.dtype == x.dtype);
}

template <int kRank>
bool is_grad_of(const View<kRank>& input, const Dense& grad) {
  if (input.data == nullptr) return grad.numel == 0;
  int64_t count = 1;
  for (int64_t size : input.size) count *= size;
  return grad.holds(count, input.dtype);
}

inline Status check_norm_bwd(const NormBwd& n) {
  const Status status = check_norm(n);
  if (status != nullptr) return status;
  if (!is_upstream_of(n.x, n.grad_y)) return "the gradient of the norm must be as x";
  const bool is_right = is_grad_of(n.x, n.grad_x) && is_grad_of(n.shift, n.grad_shift) &&
                        is_grad_of(n.scale, n.grad_scale) && is_grad_of(n.weight, n.grad_weight) &&
                        is_grad_of(n.bias, n.grad_bias);
  return is_right ? nullptr : "gradients must be as what they are of";
}

inline bool is_one_image(const View<3>& x) {
  return x.size[0] == 1 || x.size[1] == 1 || x.stride[0] == x.size[1] * x.stride[1];
}

inline void make_one_image(View<3>* x) {
  if (x->size[1] == 1) x->stride[1] = x->stride[0];
  x->size[1] *= x->size[0];
  x->size[0] = 1;
}

// Without modulation all rows are of one image where that is a view: sums over them need few
// partial sums.
template <typename... Views>
void join_images(const NormRows& n, Views*... views) {
  if (n.scale.data != nullptr || !(is_one_image(*views) && ...)) return;
  (make_one_image(views), ...);
}

// Fills what is not yet there of `n`. grad_bytes: of the gradients of a row, per column.
inline Status make_chunks(const ChunkRule& rule, int64_t grad_bytes, bool has_own_sum,
                          const Place& place, NormBwd* n) {
  const int64_t rows = n->rows_per_image(), stats_bytes = element_size(n->stats_dtype());
  const int64_t norm_sums = n->weight.data != nullptr || n->has_shared_modulation() ? 2 : 0;
  const int64_t sums = norm_sums + (has_own_sum ? 1 : 0);
  const int64_t least = ceil_div(rule.grads_per_sum * sums * stats_bytes, grad_bytes);
  const int64_t most = rows / (least > 1 ? least : 1);
  const int64_t wanted = ceil_div(rule.chunks, n->num_images());
  const int64_t chunks = wanted < most ? wanted : most;
  n->rows_per_chunk = ceil_div(rows, chunks > 1 ? chunks : 1);
  if (n->rows_per_chunk > rule.max_rows) n->rows_per_chunk = rule.max_rows;
  if (sums == 0) return nullptr;
  const int64_t sum_bytes =
      n->num_images() * ceil_div(rows, n->rows_per_chunk) * n->width() * stats_bytes;
  char* memory = place.scratch<char>(sums * sum_bytes);
  if (memory == nullptr) return kNoMemory;
  if (norm_sums > 0) n->partials = memory;
  if (has_own_sum) n->own_partials = memory + norm_sums * sum_bytes;
  return nullptr;
}

}  // namespace
}  // namespace pixelgen
