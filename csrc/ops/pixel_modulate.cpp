// normed = x * rstd * weight * (1 + scale) + shift over the d channels of a pixel, its shift and
// scale read from the packed modulation. Arithmetic in fp32 (fp64 for fp64 x). Bound by bytes:
// every number is read once and written once. One work item is a chunk of pixels.
#include "../common/pixels.h"
#include "../math/norm.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

struct PixelModulate {
  Rows<> x, modulation;  // (R, Q, d); (R, Q, 6 d), of which shift and scale are read
  Tensor<1> weight;      // (d,)
  double eps;
};

struct PixelModulateFwd : PixelModulate {
  Dense normed;  // as x
  PIXELGEN_ARGUMENTS(x, modulation, weight, normed, eps)
};

struct PixelModulateBwd : PixelModulate {
  Rows<> grad_normed;                          // (R, Q, d)
  Dense grad_x, grad_modulation, grad_weight;  // as what they are the gradients of
  PIXELGEN_ARGUMENTS(grad_normed, x, modulation, weight, grad_x, grad_modulation, grad_weight, eps)
};

constexpr int64_t kKinds = 6;
// The gradient of the weight goes through one partial sum per chunk of pixels and a second pass, so
// its bits depend on this number alone and not on how many threads run.
constexpr int64_t kPixelsPerChunk = 512;
// In two levels: the rounding errors of one long sum grow with its length.
constexpr int64_t kPixelsPerGroup = 32;

template <typename Real>
void load_weight(const Tensor<1>& weight, Real* out, int64_t d) {
  for (int64_t c = 0; c < d; ++c) load_row(weight, c * weight.stride[0], Real(0), &out[c], 1);
}

template <int kD, typename Real>
void forward(const PixelModulateFwd& p, const Place& place) {
  const int64_t d = kD > 0 ? kD : p.x.size[2], pixels = num_pixels(p.x);
  share(pixels, workers_for(pixels, place), [&](int, int64_t first, int64_t last) {
    alignas(64) Real weight[kMaxPixelWidth], x[kMaxPixelWidth], shift[kMaxPixelWidth],
        scale[kMaxPixelWidth];
    load_weight(p.weight, weight, d);
    for (int64_t pixel = first; pixel < last; ++pixel) {
      const int64_t packed = at(p.modulation, pixel);
      load_channels<kD>(p.x, at(p.x, pixel), x, d);
      load_channels<kD>(p.modulation, packed, shift, d);
      load_channels<kD>(p.modulation, packed + d, scale, d);
      const Real rstd = rms_rstd(x, d, p.eps);
#pragma omp simd
      for (int64_t c = 0; c < d; ++c)
        x[c] = x[c] * rstd * weight[c] * (Real(1) + scale[c]) + shift[c];
      store_channels<kD>(x, p.normed, pixel * d, d);
    }
  });
}

// With n = x * rstd and h = grad_normed * (1 + scale): h * n adds to the gradient of weight, and
// h * weight is the gradient of n.
template <int kD, typename Real>
void backward_pixels(const PixelModulateBwd& g, Real* partials, const Place& place) {
  const int64_t d = kD > 0 ? kD : g.x.size[2], pixels = num_pixels(g.x);
  const int64_t chunks = ceil_div(pixels, kPixelsPerChunk);
  const GradModulation<kD> grad_modulation{g.grad_modulation, kKinds, d,
                                           g.grad_modulation.data == g.modulation.data};
  share(chunks, workers_for(chunks, place), [&](int, int64_t first, int64_t last) {
    alignas(64) Real weight[kMaxPixelWidth], n[kMaxPixelWidth], scale[kMaxPixelWidth],
        grad[kMaxPixelWidth], h[kMaxPixelWidth], sums[kMaxPixelWidth], group[kMaxPixelWidth];
    load_weight(g.weight, weight, d);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t end = min_of((chunk + 1) * kPixelsPerChunk, pixels);
      for (int64_t c = 0; c < d; ++c) sums[c] = group[c] = 0;
      for (int64_t pixel = chunk * kPixelsPerChunk; pixel < end; ++pixel) {
        if (pixel % kPixelsPerGroup == 0) {
          for (int64_t c = 0; c < d; ++c) sums[c] += group[c], group[c] = 0;
        }
        load_channels<kD>(g.grad_normed, at(g.grad_normed, pixel), grad, d);
        load_channels<kD>(g.x, at(g.x, pixel), n, d);
        // before the gradient is written, which may be in its place
        load_channels<kD>(g.modulation, at(g.modulation, pixel) + d, scale, d);
        const Real rstd = rms_rstd(n, d, g.eps);
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) {
          n[c] *= rstd;
          h[c] = grad[c] * (Real(1) + scale[c]);
          group[c] += h[c] * n[c];
          h[c] *= weight[c];
          scale[c] = grad[c] * n[c] * weight[c];
        }
        const Real mean = sum_channels<Real>(d, [&](int64_t c) { return h[c] * n[c]; }) / Real(d);
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) n[c] = math::norm_grad_x(h[c], n[c], rstd, Real(0), mean);
        store_channels<kD>(n, g.grad_x, pixel * d, d);
        grad_modulation.store(pixel, 0, grad);
        grad_modulation.store(pixel, 1, scale);
        grad_modulation.template store_zeros<4>(pixel, 2, Real(0));
      }
      for (int64_t c = 0; c < d; ++c) sums[c] += group[c];
      store_row(sums, partials + chunk * d, d);
    }
  });
}

// Adds up the partial sums, always in the same order.
template <typename Real>
void backward_sums(const PixelModulateBwd& g, const Real* partials, int64_t chunks, int64_t d) {
  double sums[kMaxPixelWidth] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < d; ++c) sums[c] += double(partials[chunk * d + c]);
  store_row(sums, g.grad_weight, 0, d);
}

Status problem(const PixelModulate& p) {
  const int64_t d = p.x.size[2];
  if (d < 1 || d > kMaxPixelWidth) return "x must have 1 to 64 channels";
  if (!p.modulation.fits(p.x.size[0], p.x.size[1], kKinds * d))
    return "modulation must have shape (R, Q, 6 d)";
  return p.weight.fits(d) ? nullptr : "weight must have shape (d,)";
}

}  // namespace

Status pixel_modulate_fwd(const PixelModulateFwd& p, const Place& place) {
  const int64_t d = p.x.size[2];
  if (const Status status = problem(p)) return status;
  if (!p.normed.holds(num_pixels(p.x) * d, p.x.dtype)) return "normed must be as x";
  with_width(p.x.dtype, d, [&](auto real, auto width) {
    forward<decltype(width)::value, decltype(real)>(p, place);
  });
  return nullptr;
}

Status pixel_modulate_bwd(const PixelModulateBwd& g, const Place& place) {
  const int64_t d = g.x.size[2], pixels = num_pixels(g.x);
  if (const Status status = problem(g)) return status;
  if (!g.grad_normed.fits(g.x.size[0], g.x.size[1], d)) return "grad_normed must be as x";
  if (!g.grad_x.holds(pixels * d, g.x.dtype) ||
      !g.grad_modulation.holds(pixels * kKinds * d, g.modulation.dtype) ||
      !g.grad_weight.holds(d, g.weight.dtype))
    return "the results must be as x, modulation and weight";
  Status status = kNoMemory;
  with_width(g.x.dtype, d, [&](auto real, auto width) {
    using Real = decltype(real);
    const int64_t chunks = ceil_div(pixels, kPixelsPerChunk);
    Real* partials = place.scratch<Real>(chunks * d);
    if (partials == nullptr) return;
    backward_pixels<decltype(width)::value>(g, partials, place);
    backward_sums(g, partials, chunks, d);
    status = nullptr;
  });
  return status;
}

PIXELGEN_OPS(pixel_modulate, PIXELGEN_OP(pixel_modulate_fwd), PIXELGEN_OP(pixel_modulate_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
