// Forward of a norm with shift and scale: the op says where the row comes from (`Source`).
#pragma once

#include "norm_rows.cuh"

namespace pixelgen::cuda {

constexpr int kForwardThreads = 128;  // of a block; narrow rows share one
constexpr int kForwardRows = 8;       // of each row of threads: folding costs 1/8 of a row's work

// Source gives N neighbours of a row: Source::Fetch holds what they are made of, `fetch` requests
// it, `values` makes them, `keep` stores what else the op wants of them.
template <typename Source, bool kPerToken>
__global__ void __launch_bounds__(kMaxThreads)
    norm_fwd_kernel(const NormFwd p, const typename Source::Op op, const Tiling tiling) {
  constexpr int N = Source::N, kPacks = kPerThread / N;
  using T = typename Source::T;
  using Fetch = typename Source::Fetch;
  __shared__ float storage[2 * RowSums::kSize];
  RowSums row_sums(storage);
  const BlockRows<N> block(p, tiling);
  const int C = int(p.width());
  const float inverse_width = 1.0f / float(C);

  int64_t row = block.first + threadIdx.y;
  Fetch next[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = column<N>(block.section, i);
    if (row < block.last && c < C) next[i].fetch(p, op, block.image, row, c);
  }
  // one factor and one offset per column; weight and bias when shift and scale are per token
  float factor[kPacks][N], offset[kPacks][N];
  {
    FetchedModulation<N> modulation[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
      if (c >= C) continue;
      modulation[i].fetch_affine(p, c);
      if constexpr (!kPerToken) {
        modulation[i].fetch_scale(p, block.image, 0, c);
        modulation[i].fetch_shift(p, block.image, 0, c);
      }
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float scale[N], shift[N];
      const bool is_in = column<N>(block.section, i) < C;
      values_or(modulation[i].weight, p.weight, 1.0f, factor[i], is_in);
      values_or(modulation[i].bias, p.bias, 0.0f, offset[i], is_in);
      values_or(modulation[i].scale, p.scale, 0.0f, scale, is_in && !kPerToken);
      values_or(modulation[i].shift, p.shift, 0.0f, shift, is_in && !kPerToken);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const math::Affine<float> affine =
            math::fold_modulation(factor[i][j], offset[i][j], scale[j], shift[j]);
        factor[i][j] = affine.factor;
        offset[i][j] = affine.offset;
      }
    }
  }

  // rows of threads without a row stay for the sums
  for (int64_t base = block.first; base < block.last; base += blockDim.y, row += blockDim.y) {
    const bool is_live = row < block.last;
    const int64_t dense_row = block.image * p.rows_per_image() + row;
    float x[kPacks][N];
    float sum = 0.0f, squares = 0.0f, unused = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
#pragma unroll
      for (int j = 0; j < N; ++j) x[i][j] = 0.0f;
      if (is_live && c < C) {
        next[i].values(p, op, block.image, row, c, x[i]);
        Source::keep(p, op, dense_row, c, x[i]);
        if (row + blockDim.y < block.last) {
          next[i].fetch(p, op, block.image, row + blockDim.y, c);
        }
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum += x[i][j];
        squares += x[i][j] * x[i][j];
      }
    }
    // Adds term(x) over the row's other sections, which other blocks hold.
    const auto add_sections = [&](float& total, auto term) {
      for (int section = 0; N == 1 && is_live && section < tiling.sections; ++section) {
        if (section == block.section) continue;
#pragma unroll 1
        for (int i = 0; i < kPacks; ++i) {
          const int c = column<N>(section, i);
          if (c >= C) continue;
          Fetch fetch;
          float values[N];
          fetch.fetch(p, op, block.image, row, c);
          fetch.values(p, op, block.image, row, c, values);
#pragma unroll
          for (int j = 0; j < N; ++j) total += term(values[j]);
        }
      }
    };
    FetchedModulation<N> modulation[kPacks];
    if (kPerToken && is_live) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int c = column<N>(block.section, i);
        if (c >= C) continue;
        modulation[i].fetch_scale(p, block.image, row, c);
        modulation[i].fetch_shift(p, block.image, row, c);
      }
    }
    float mean = 0.0f;
    if (p.is_layer_norm()) {
      add_sections(sum, [](float value) { return value; });
      row_sums.add(sum, unused);
      mean = sum * inverse_width;
      squares = 0.0f;  // around the mean: the difference of two large sums would lose digits
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const bool is_in = column<N>(block.section, i) < C;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          squares += is_in ? (x[i][j] - mean) * (x[i][j] - mean) : 0.0f;
        }
      }
    }
    add_sections(squares, [mean](float value) { return (value - mean) * (value - mean); });
    row_sums.add(squares, unused);
    const float rstd = 1.0f / sqrtf(squares * inverse_width + float(p.eps));
    if (!is_live) continue;
    if (block.section == 0 && threadIdx.x == 0) {
      if (p.is_layer_norm()) p.mean.as<float>()[dense_row] = mean;
      p.rstd.as<float>()[dense_row] = rstd;
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
      if (c >= C) continue;
      float scale[N], shift[N];
      if constexpr (kPerToken) {
        modulation[i].scale.values(p.scale.dtype, scale);
        modulation[i].shift.values(p.shift.dtype, shift);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        math::Affine<float> affine{factor[i][j], offset[i][j]};
        if constexpr (kPerToken) {
          affine = math::fold_modulation(affine.factor, affine.offset, scale[j], shift[j]);
        }
        x[i][j] = math::modulate(math::normalise(x[i][j], mean, rstd), affine);
      }
      store_values<T>(x[i], p.y, dense_row * C + c);
    }
  }
}

template <typename Source>
Status launch_norm_fwd(const NormFwd& p, const typename Source::Op& op, const Place& place) {
  const int64_t rows = p.rows_per_image();
  const int sections = make_tiling(p, rows, kMaxThreads).sections;
  const dim3 shape = block_shape(p.width(), sections, kForwardThreads, rows);
  const Tiling tiling = make_tiling(p, int64_t(shape.y) * kForwardRows, kMaxThreads);
  const auto kernel =
      p.scale.per_row ? norm_fwd_kernel<Source, true> : norm_fwd_kernel<Source, false>;
  return launch_rows(kernel, p, op, tiling, kForwardThreads, place);
}

}  // namespace pixelgen::cuda
