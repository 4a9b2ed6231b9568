// Tiles of pixel_mlp: the weights as right sides of products, a pixel with its modulation, the
// matrices of some pixels at once. For pixel_mlp.cpp alone.
#pragma once

#include "../common/pixels.h"
#include "../common/small_matmul.h"
#include "../math/norm.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

struct PixelMlp {
  Rows<> x, y, modulation;  // (R, Q, d), (R, Q, d), (R, Q, 6 d) or (R, Q, 4 d)
  Tensor<1> norm_weight;    // (d,)
  Dense fc1_weight, fc1_bias, fc2_weight, fc2_bias;  // (F, d), (F,), (d, F), (d,)
  double eps;
};

constexpr int64_t kMaxHidden = 256;
constexpr int64_t kTile = 32;  // pixels; with F = 64 their hidden values take 8 KB
static_assert(kTile % kRowsAtOnce == 0 && kPadding % kRowsAtOnce == 0, "no remainders");

int64_t width(const PixelMlp& p) { return p.x.size[2]; }
int64_t hidden_width(const PixelMlp& p) { return p.fc1_bias.numel; }

// Hands out memory by the row.
template <typename Real>
class Memory {
 public:
  explicit Memory(Real* next) : next_(next) {}
  Padded<Real> matrix(int64_t rows, int64_t columns) {
    const Padded<Real> made{next_, padded(columns)};
    next_ += rows * made.stride;
    return made;
  }

 private:
  Real* next_;
};

template <typename Real>
Padded<const Real> read_only(Padded<Real> matrix) {
  return {matrix.data, matrix.stride};
}

template <typename Real>
void fill_zeros(Padded<Real> matrix, int64_t rows) {
  for (int64_t i = 0; i < rows * matrix.stride; ++i) matrix.data[i] = 0;
}

// out (rows, columns) = element(i, j) of a dense matrix of `stride_i` and `stride_j`.
template <typename Real>
void load_matrix(const Dense& from, int64_t stride_i, int64_t stride_j, int64_t rows,
                 int64_t columns, Padded<Real> out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      load_row(from.data, from.dtype, i * stride_i + j * stride_j, Real(0),
               &out.data[i * out.stride + j], 1);
}

// The weights as right sides of products. Rows beyond d or F, and columns, are zeros.
template <typename Real>
struct Weights {
  Padded<Real> norm, fc1_bias, fc2_bias;  // one row each
  Padded<Real> fc1, fc1_transposed;       // (F, d), (d, F)
  Padded<Real> fc2, fc2_transposed;       // (d, F), (F, d)

  static int64_t size(int64_t d, int64_t F) {
    return 2 * padded(d) + padded(F) + 2 * d * padded(F) + 2 * F * padded(d);
  }
  Weights(const PixelMlp& p, Real* memory) {
    const int64_t d = width(p), F = hidden_width(p);
    for (int64_t i = 0; i < size(d, F); ++i) memory[i] = 0;
    Memory<Real> rows(memory);
    norm = rows.matrix(1, d), fc1_bias = rows.matrix(1, F), fc2_bias = rows.matrix(1, d);
    fc1 = rows.matrix(F, d), fc1_transposed = rows.matrix(d, F);
    fc2 = rows.matrix(d, F), fc2_transposed = rows.matrix(F, d);
    for (int64_t c = 0; c < d; ++c)
      load_row(p.norm_weight, c * p.norm_weight.stride[0], Real(0), &norm.data[c], 1);
    load_matrix(p.fc1_bias, F, 1, 1, F, fc1_bias);
    load_matrix(p.fc2_bias, d, 1, 1, d, fc2_bias);
    load_matrix(p.fc1_weight, d, 1, F, d, fc1);
    load_matrix(p.fc1_weight, 1, d, d, F, fc1_transposed);
    load_matrix(p.fc2_weight, F, 1, d, F, fc2);
    load_matrix(p.fc2_weight, 1, F, F, d, fc2_transposed);
  }
  // One row for every row of a product.
  static Padded<const Real> every_row(Padded<Real> row) { return {row.data, 0}; }
};

// A pixel and its modulation. kPost: the four kinds of post-modulation, scale and shift of the
// attention, then of the MLP; else the last four of six, gate, shift, scale, gate.
template <int kD, bool kPost, typename Real>
struct Pixel {
  alignas(64) Real y[kMaxPixelWidth], r[kMaxPixelWidth];
  alignas(64) Real attn[kMaxPixelWidth], attn_offset[kMaxPixelWidth];
  alignas(64) Real norm[kMaxPixelWidth], norm_offset[kMaxPixelWidth];
  alignas(64) Real mlp[kMaxPixelWidth], mlp_offset[kMaxPixelWidth];

  // What `load` will read, one tile ahead of it: meanwhile this one is computed.
  PIXELGEN_INLINE void prefetch(const PixelMlp& p, int64_t pixel, int64_t d) {
    prefetch_channels(p.x, at(p.x, pixel), d);
    prefetch_channels(p.y, at(p.y, pixel), d);
    prefetch_channels(p.modulation, at(p.modulation, pixel) + (kPost ? 0 : 2) * d, 4 * d);
  }

  PIXELGEN_MEMBER void load(const PixelMlp& p, int64_t pixel, int64_t d) {
    const auto load_kind = [&](int64_t kind, Real* out) {
      load_channels<kD>(p.modulation, at(p.modulation, pixel) + kind * d, out, d);
    };
    load_channels<kD>(p.x, at(p.x, pixel), r, d);
    load_channels<kD>(p.y, at(p.y, pixel), y, d);
    if constexpr (kPost) {
      load_kind(0, attn), load_kind(1, attn_offset), load_kind(2, mlp), load_kind(3, mlp_offset);
    } else {
      load_kind(2, attn), load_kind(3, norm_offset), load_kind(4, norm), load_kind(5, mlp);
    }
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      if constexpr (kPost) {
        attn[c] += Real(1), mlp[c] += Real(1);
        r[c] += attn[c] * y[c] + attn_offset[c];
        norm[c] = 1, norm_offset[c] = 0;
      } else {
        norm[c] += Real(1);
        r[c] = math::add_gated(r[c], attn[c], y[c]);
        mlp_offset[c] = 0;
      }
    }
  }
};

// Matrices of a tile, a row for each pixel. Padding stays zero from the beginning.
template <typename Real>
struct Tile {
  Padded<Real> r, u, o, hidden;

  static int64_t size(int64_t d, int64_t F) { return kTile * (3 * padded(d) + padded(F)); }
  Tile(Real* memory, int64_t d, int64_t F) {
    Memory<Real> rows(memory);
    r = rows.matrix(kTile, d), u = rows.matrix(kTile, d), o = rows.matrix(kTile, d);
    hidden = rows.matrix(kTile, F);
    fill_zeros(u, kTile);
  }
};

}  // namespace
}  // namespace pixelgen::cpu::PIXELGEN_ISA
