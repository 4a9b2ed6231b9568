// The second half of a pixel block, pixel by pixel:
//
//   r = x + y * attn (+ attn_offset),  u = norm(r) * weight (* norm_factor + norm_offset)
//   out = r + mlp * (fc2 gelu(fc1 u)) (+ mlp_offset)
//
// Arithmetic in fp32 (fp64 for fp64 x). Pixels go through in tiles whose hidden values stay in the
// first-level cache; backward computes them again. One work item is a tile, in backward a chunk of
// tiles, over which it adds up the gradients of the weights.
// The rounding in gelu (math/gelu.h) is a sum whose order matters:
// flags: -fno-associative-math
#include "../math/gelu.h"
#include "pixel_mlp_tile.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

struct PixelMlpFwd : PixelMlp {
  Dense out;  // as x
  PIXELGEN_ARGUMENTS(x, y, modulation, norm_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, out,
                     eps)
};

struct PixelMlpBwd : PixelMlp {
  Rows<> grad_out;  // (R, Q, d)
  // as what they are the gradients of; that of the modulation may be in its very place
  Dense grad_x, grad_y, grad_modulation, grad_norm_weight, grad_fc1_weight, grad_fc1_bias,
      grad_fc2_weight, grad_fc2_bias;
  PIXELGEN_ARGUMENTS(grad_out, x, y, modulation, norm_weight, fc1_weight, fc1_bias, fc2_weight,
                     fc2_bias, grad_x, grad_y, grad_modulation, grad_norm_weight, grad_fc1_weight,
                     grad_fc1_bias, grad_fc2_weight, grad_fc2_bias, eps)
};

// Gradients of weights go through one partial sum per chunk of pixels and a second pass, so their
// bits depend on this number alone and not on how many threads run. Many pixels: a partial sum has
// 2 d F numbers. A chunk has groups with sums of their own: the rounding errors of one long sum
// grow with its length.
constexpr int64_t kPixelsPerChunk = 2048, kPixelsPerGroup = 256;
static_assert(kPixelsPerGroup % kTile == 0 && kPixelsPerChunk % kPixelsPerGroup == 0,
              "no remainders");

template <int kD, bool kPost, typename Real>
void forward(const PixelMlpFwd& p, const Weights<Real>& w, Real* memory, int workers) {
  const int64_t d = kD > 0 ? kD : width(p), F = hidden_width(p), pixels = num_pixels(p.x);
  share(ceil_div(pixels, kTile), workers, [&](int worker, int64_t first, int64_t last) {
    const Tile<Real> tile(memory + worker * Tile<Real>::size(d, F), d, F);
    Pixel<kD, kPost, Real> pixel;
    alignas(64) Real mlp[kTile * kMaxPixelWidth];
    for (int64_t begin = first * kTile; begin < min_of(last * kTile, pixels); begin += kTile) {
      const int64_t n = min_of(kTile, pixels - begin);
      for (int64_t i = 0; i < n; ++i) {
        pixel.prefetch(p, min_of(begin + kTile + i, pixels - 1), d);
        pixel.load(p, begin + i, d);
        const Real rstd = rms_rstd(pixel.r, d, p.eps);
        Real *r = tile.r.data + i * tile.r.stride, *u = tile.u.data + i * tile.u.stride;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) {
          u[c] = pixel.r[c] * rstd * w.norm.data[c] * pixel.norm[c] + pixel.norm_offset[c];
          r[c] = pixel.r[c] + pixel.mlp_offset[c];
          mlp[i * d + c] = pixel.mlp[c];
        }
      }
      multiply(kTile, tile.hidden.stride, d, {tile.u.data, tile.u.stride, 1},
               read_only(w.fc1_transposed), w.every_row(w.fc1_bias), tile.hidden);
      const int64_t count = kTile * tile.hidden.stride;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        tile.hidden.data[i] = math::gelu_and_slope(tile.hidden.data[i]).value;
      multiply(kTile, tile.o.stride, F, {tile.hidden.data, tile.hidden.stride, 1},
               read_only(w.fc2_transposed), w.every_row(w.fc2_bias), tile.o);
      for (int64_t i = 0; i < n; ++i) {
        const Real* r = tile.r.data + i * tile.r.stride;
        Real* out = tile.o.data + i * tile.o.stride;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) out[c] = math::add_gated(r[c], mlp[i * d + c], out[c]);
        store_channels<kD>(out, p.out, (begin + i) * d, d);
      }
    }
  });
}

// Sums over the pixels of a chunk, the gradients of the weights; fc1 transposed.
template <typename Real>
struct Sums {
  Padded<Real> norm, fc1_bias, fc2_bias, fc1, fc2;

  static int64_t size(int64_t d, int64_t F) {
    return 2 * padded(d) + padded(F) + 2 * padded(d) * padded(F);
  }
  Sums(Real* memory, int64_t d, int64_t F) {
    Memory<Real> rows(memory);
    norm = rows.matrix(1, d), fc1_bias = rows.matrix(1, F), fc2_bias = rows.matrix(1, d);
    fc1 = rows.matrix(padded(d), F), fc2 = rows.matrix(padded(d), F);
  }
};

// The same with what backward needs of a pixel until the end.
template <typename Real>
struct BackwardTile : Tile<Real> {
  Padded<Real> grad_hidden, grad, h, grad_u;
  Real rstd[kTile];

  static int64_t size(int64_t d, int64_t F) {
    return Tile<Real>::size(d, F) + kTile * (3 * padded(d) + padded(F));
  }
  BackwardTile(Real* memory, int64_t d, int64_t F) : Tile<Real>(memory, d, F) {
    Memory<Real> rows(memory + Tile<Real>::size(d, F));
    grad_hidden = rows.matrix(kTile, F), grad = rows.matrix(kTile, d);
    h = rows.matrix(kTile, d), grad_u = rows.matrix(kTile, d);
    fill_zeros(h, kTile);
  }
};

template <int kD, bool kPost, typename Real>
void backward_tile(const PixelMlpBwd& g, const Weights<Real>& w, BackwardTile<Real>& tile,
                   const Sums<Real>& sums, int64_t begin, int64_t n) {
  const int64_t d = kD > 0 ? kD : width(g), F = hidden_width(g);
  const GradModulation<kD> grad_modulation{g.grad_modulation, kPost ? 4 : 6, d,
                                           g.grad_modulation.data == g.modulation.data};
  Pixel<kD, kPost, Real> pixel;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t later = min_of(begin + kTile + i, num_pixels(g.x) - 1);
    pixel.prefetch(g, later, d);
    prefetch_channels(g.grad_out, at(g.grad_out, later), d);
    pixel.load(g, begin + i, d);
    Real *r = tile.r.data + i * tile.r.stride, *u = tile.u.data + i * tile.u.stride;
    Real *h = tile.h.data + i * tile.h.stride, *grad = tile.grad.data + i * tile.grad.stride;
    load_channels<kD>(g.grad_out, at(g.grad_out, begin + i), grad, d);
    const Real rstd = tile.rstd[i] = rms_rstd(pixel.r, d, g.eps);
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      r[c] = pixel.r[c] * rstd;  // normalised
      u[c] = r[c] * w.norm.data[c] * pixel.norm[c] + pixel.norm_offset[c];
      h[c] = pixel.mlp[c] * grad[c];
    }
  }

  multiply(kTile, tile.hidden.stride, d, {tile.u.data, tile.u.stride, 1},
           read_only(w.fc1_transposed), w.every_row(w.fc1_bias), tile.hidden);
  fill_zeros(tile.grad_hidden, kTile);
  multiply(kTile, tile.hidden.stride, d, {tile.h.data, tile.h.stride, 1}, read_only(w.fc2),
           read_only(tile.grad_hidden), tile.grad_hidden);
  const int64_t count = kTile * tile.hidden.stride;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const auto gelu = math::gelu_and_slope(tile.hidden.data[i]);
    tile.hidden.data[i] = gelu.value;
    tile.grad_hidden.data[i] *= gelu.slope;
  }
  multiply(kTile, tile.o.stride, F, {tile.hidden.data, tile.hidden.stride, 1},
           read_only(w.fc2_transposed), w.every_row(w.fc2_bias), tile.o);
  fill_zeros(tile.grad_u, kTile);
  multiply(kTile, tile.grad_u.stride, F, {tile.grad_hidden.data, tile.grad_hidden.stride, 1},
           read_only(w.fc1), read_only(tile.grad_u), tile.grad_u);
  multiply(padded(d), tile.hidden.stride, n, {tile.u.data, 1, tile.u.stride},
           read_only(tile.grad_hidden), read_only(sums.fc1), sums.fc1);
  multiply(padded(d), tile.hidden.stride, n, {tile.h.data, 1, tile.h.stride},
           read_only(tile.hidden), read_only(sums.fc2), sums.fc2);
  add_rows(read_only(tile.grad_hidden), n, sums.fc1_bias.data);
  add_rows(read_only(tile.h), n, sums.fc2_bias.data);

  for (int64_t i = 0; i < n; ++i) {
    // again, and before the gradient is written, which may be in the place of the modulation
    pixel.load(g, begin + i, d);
    const Real *normed = tile.r.data + i * tile.r.stride, *o = tile.o.data + i * tile.o.stride;
    const Real *grad = tile.grad.data + i * tile.grad.stride,
               *grad_u = tile.grad_u.data + i * tile.grad_u.stride;
    Real* grad_weight = tile.u.data + i * tile.u.stride;  // u has been read
    alignas(64) Real grad_n[kMaxPixelWidth], grad_r[kMaxPixelWidth], grad_scale[kMaxPixelWidth],
        grad_attn[kMaxPixelWidth], grad_mlp[kMaxPixelWidth];
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      const Real grad_scaled = grad_u[c] * pixel.norm[c];  // of normed * weight
      grad_weight[c] = grad_scaled * normed[c];
      grad_n[c] = grad_scaled * w.norm.data[c];
      grad_scale[c] = grad_u[c] * normed[c] * w.norm.data[c];
      grad_mlp[c] = grad[c] * o[c];
    }
    const Real mean =
        sum_channels<Real>(d, [&](int64_t c) { return grad_n[c] * normed[c]; }) / Real(d);
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      grad_r[c] = grad[c] + math::norm_grad_x(grad_n[c], normed[c], tile.rstd[i], Real(0), mean);
      const auto branch = math::branch_grads(pixel.attn[c], pixel.y[c], grad_r[c]);
      pixel.y[c] = branch.y, grad_attn[c] = branch.gate;
    }
    store_channels<kD>(grad_r, g.grad_x, (begin + i) * d, d);
    store_channels<kD>(pixel.y, g.grad_y, (begin + i) * d, d);
    if constexpr (kPost) {
      grad_modulation.store(begin + i, 0, grad_attn);
      grad_modulation.store(begin + i, 1, grad_r);
      grad_modulation.store(begin + i, 2, grad_mlp);
      grad_modulation.store(begin + i, 3, grad);
    } else {
      grad_modulation.template store_zeros<2>(begin + i, 0, Real(0));
      grad_modulation.store(begin + i, 2, grad_attn);
      grad_modulation.store(begin + i, 3, grad_u);
      grad_modulation.store(begin + i, 4, grad_scale);
      grad_modulation.store(begin + i, 5, grad_mlp);
    }
  }
  add_rows(read_only(tile.u), n, sums.norm.data);
}

template <int kD, bool kPost, typename Real>
void backward_pixels(const PixelMlpBwd& g, const Weights<Real>& w, Real* memory, Real* partials,
                     int workers) {
  const int64_t d = width(g), F = hidden_width(g), pixels = num_pixels(g.x);
  share(ceil_div(pixels, kPixelsPerChunk), workers, [&](int worker, int64_t first, int64_t last) {
    const int64_t of_tile = BackwardTile<Real>::size(d, F), of_sums = Sums<Real>::size(d, F);
    Real* group_sums = memory + worker * (of_tile + of_sums);
    BackwardTile<Real> tile(group_sums + of_sums, d, F);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      Real* sums = partials + chunk * of_sums;
      for (int64_t i = 0; i < of_sums; ++i) sums[i] = 0;
      const int64_t end = min_of((chunk + 1) * kPixelsPerChunk, pixels);
      for (int64_t group = chunk * kPixelsPerChunk; group < end; group += kPixelsPerGroup) {
        for (int64_t i = 0; i < of_sums; ++i) group_sums[i] = 0;
        const int64_t end_of_group = min_of(group + kPixelsPerGroup, end);
        for (int64_t begin = group; begin < end_of_group; begin += kTile) {
          backward_tile<kD, kPost>(g, w, tile, Sums<Real>(group_sums, d, F), begin,
                                   min_of(kTile, end_of_group - begin));
        }
        for (int64_t i = 0; i < of_sums; ++i) sums[i] += group_sums[i];
      }
    }
  });
}

// Adds up the partial sums of each weight, always in the same order, in fp64.
template <typename Real>
void backward_sums(const PixelMlpBwd& g, Real* partials, int64_t chunks) {
  const int64_t d = width(g), F = hidden_width(g), size = Sums<Real>::size(d, F);
  const Sums<Real> first(partials, d, F);
  const auto store = [&](Padded<Real> from, int64_t row, int64_t column, int64_t rows,
                         int64_t columns, const Dense& to) {
    double sums[kMaxHidden];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Real* values = from.data + chunk * size;
        for (int64_t j = 0; j < columns; ++j) sums[j] += double(values[i * row + j * column]);
      }
      store_row(sums, to, i * columns, columns);
    }
  };
  store(first.norm, 0, 1, 1, d, g.grad_norm_weight);
  store(first.fc1_bias, 0, 1, 1, F, g.grad_fc1_bias);
  store(first.fc2_bias, 0, 1, 1, d, g.grad_fc2_bias);
  store(first.fc1, 1, first.fc1.stride, F, d, g.grad_fc1_weight);
  store(first.fc2, first.fc2.stride, 1, d, F, g.grad_fc2_weight);
}

Status problem(const PixelMlp& p) {
  const int64_t d = width(p), F = hidden_width(p);
  if (d < 1 || d > kMaxPixelWidth) return "x must have 1 to 64 channels";
  if (F < 1 || F > kMaxHidden) return "fc1_bias must have 1 to 256 elements";
  if (!p.y.fits(p.x.size[0], p.x.size[1], d)) return "y must be as x";
  if (!p.modulation.fits(p.x.size[0], p.x.size[1], 6 * d) &&
      !p.modulation.fits(p.x.size[0], p.x.size[1], 4 * d))
    return "modulation must have shape (R, Q, 6 d) or (R, Q, 4 d)";
  if (!p.norm_weight.fits(d) || p.fc1_weight.numel != F * d || p.fc2_weight.numel != d * F ||
      p.fc2_bias.numel != d)
    return "the weights must have shapes (d,), (F, d), (F,), (d, F) and (d,)";
  return nullptr;
}

// Calls fn(Real{}, PixelWidth<kD>{}, a PixelWidth that is 1 for the four kinds of post-modulation).
template <typename Fn>
void with_kinds(const PixelMlp& p, Fn fn) {
  with_width(p.x.dtype, width(p), [&](auto real, auto width) {
    p.modulation.size[2] == 4 * p.x.size[2] ? fn(real, width, PixelWidth<1>{})
                                            : fn(real, width, PixelWidth<0>{});
  });
}

}  // namespace

Status pixel_mlp_fwd(const PixelMlpFwd& p, const Place& place) {
  if (const Status status = problem(p)) return status;
  const int64_t d = width(p), F = hidden_width(p), pixels = num_pixels(p.x);
  if (!p.out.holds(pixels * d, p.x.dtype)) return "out must be as x";
  const int workers = workers_for(ceil_div(pixels, kTile), place);
  Status status = kNoMemory;
  with_kinds(p, [&](auto real, auto width, auto post) {
    using Real = decltype(real);
    const int64_t of_weights = Weights<Real>::size(d, F);
    Real* memory = place.scratch<Real>(of_weights + workers * Tile<Real>::size(d, F));
    if (memory == nullptr) return;
    const Weights<Real> weights(p, memory);
    forward<decltype(width)::value, decltype(post)::value == 1>(p, weights, memory + of_weights,
                                                                workers);
    status = nullptr;
  });
  return status;
}

Status pixel_mlp_bwd(const PixelMlpBwd& g, const Place& place) {
  if (const Status status = problem(g)) return status;
  const int64_t d = width(g), F = hidden_width(g), pixels = num_pixels(g.x);
  if (!g.grad_out.fits(g.x.size[0], g.x.size[1], d)) return "grad_out must be as x";
  if (!g.grad_x.holds(pixels * d, g.x.dtype) || !g.grad_y.holds(pixels * d, g.y.dtype) ||
      !g.grad_modulation.holds(pixels * g.modulation.size[2], g.modulation.dtype) ||
      !g.grad_norm_weight.holds(d, g.norm_weight.dtype) ||
      !g.grad_fc1_weight.holds(F * d, g.fc1_weight.dtype) ||
      !g.grad_fc1_bias.holds(F, g.fc1_bias.dtype) ||
      !g.grad_fc2_weight.holds(d * F, g.fc2_weight.dtype) ||
      !g.grad_fc2_bias.holds(d, g.fc2_bias.dtype))
    return "the results must be as x, y, modulation and the weights";
  const int64_t chunks = ceil_div(pixels, kPixelsPerChunk);
  const int workers = workers_for(chunks, place);
  Status status = kNoMemory;
  with_kinds(g, [&](auto real, auto width, auto post) {
    using Real = decltype(real);
    const int64_t of_weights = Weights<Real>::size(d, F),
                  of_tiles = workers * (BackwardTile<Real>::size(d, F) + Sums<Real>::size(d, F));
    Real* memory = place.scratch<Real>(of_weights + of_tiles + chunks * Sums<Real>::size(d, F));
    if (memory == nullptr) return;
    const Weights<Real> weights(g, memory);
    Real *tiles = memory + of_weights, *partials = tiles + of_tiles;
    backward_pixels<decltype(width)::value, decltype(post)::value == 1>(g, weights, tiles, partials,
                                                                        workers);
    backward_sums(g, partials, chunks);
    status = nullptr;
  });
  return status;
}

PIXELGEN_OPS(pixel_mlp, PIXELGEN_OP(pixel_mlp_fwd), PIXELGEN_OP(pixel_mlp_bwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
