// Forward of a norm with shift and scale: the op says where the row comes from (`Rows`).
#pragma once

#include "../math/norm.h"
#include "../rms_norm_modulate.h"
#include "norm_rows.cuh"
#include "vec.cuh"

namespace pixelgen::cuda {

constexpr int kForwardThreads = 128;  // of a block; narrow rows share one
constexpr int kForwardRows = 8;       // of each row of threads: folding costs 1/8 of a row's work

// Rows gives N neighbours of a row: Rows::Fetch holds what they are made of, `fetch` requests it,
// `values` makes them, `keep` stores what else the op wants of them.
template <typename Rows, bool kPerToken>
__global__ void __launch_bounds__(kMaxThreads)
    norm_fwd_kernel(const typename Rows::Params params, const Tiling tiling) {
  constexpr int N = Rows::N, kPacks = kPerThread / N;
  using T = typename Rows::T;
  using Fetch = typename Rows::Fetch;
  __shared__ float storage[2 * RowSums::kSize];
  RowSums row_sums(storage);
  const RmsNormModulateParams& p = Rows::norm(params);
  const BlockRows<N> block(p, tiling);
  const int C = int(p.C);
  const float inverse_width = 1.0f / float(C);

  int64_t row = block.first + threadIdx.y;
  Fetch next[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = column<N>(block.section, i);
    if (row < block.last && c < C) next[i].fetch(params, block.image, row, c);
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
      const void* shared_scale = is_in && !kPerToken ? p.scale : nullptr;
      const void* shared_shift = is_in && !kPerToken ? p.shift : nullptr;
      values_or(modulation[i].weight, is_in ? p.weight : nullptr, p.weight_dtype, 1.0f, factor[i]);
      values_or(modulation[i].bias, is_in ? p.bias : nullptr, p.weight_dtype, 0.0f, offset[i]);
      values_or(modulation[i].scale, shared_scale, p.modulation_dtype, 0.0f, scale);
      values_or(modulation[i].shift, shared_shift, p.modulation_dtype, 0.0f, shift);
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
    const int64_t dense_row = block.image * p.rows_per_image + row;
    float x[kPacks][N];
    float sum = 0.0f, squares = 0.0f, unused = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
#pragma unroll
      for (int j = 0; j < N; ++j) x[i][j] = 0.0f;
      if (is_live && c < C) {
        next[i].values(params, block.image, row, c, x[i]);
        Rows::keep(params, dense_row, c, x[i]);
        if (row + blockDim.y < block.last) {
          next[i].fetch(params, block.image, row + blockDim.y, c);
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
          fetch.fetch(params, block.image, row, c);
          fetch.values(params, block.image, row, c, values);
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
    if (p.layer_norm) {
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
      if (p.layer_norm) static_cast<float*>(p.mean)[dense_row] = mean;
      static_cast<float*>(p.rstd)[dense_row] = rstd;
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int c = column<N>(block.section, i);
      if (c >= C) continue;
      float scale[N], shift[N];
      if constexpr (kPerToken) {
        modulation[i].scale.values(p.modulation_dtype, scale);
        modulation[i].shift.values(p.modulation_dtype, shift);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        math::Affine<float> affine{factor[i][j], offset[i][j]};
        if constexpr (kPerToken) {
          affine = math::fold_modulation(affine.factor, affine.offset, scale[j], shift[j]);
        }
        x[i][j] = math::modulate(math::normalise(x[i][j], mean, rstd), affine);
      }
      store_values<T>(x[i], p.y, p.x_dtype, dense_row * C + c);
    }
  }
}

template <typename Rows>
Status launch_norm_fwd(const typename Rows::Params& params, cudaStream_t stream) {
  const RmsNormModulateParams& p = Rows::norm(params);
  Tiling tiling = make_tiling(p, p.rows_per_image, kMaxThreads);
  const dim3 shape = block_shape(p.C, tiling.sections, kForwardThreads, p.rows_per_image);
  tiling = make_tiling(p, int64_t(shape.y) * kForwardRows, kMaxThreads);
  const auto kernel = p.per_token ? norm_fwd_kernel<Rows, true> : norm_fwd_kernel<Rows, false>;
  return launch_rows(kernel, p, params, tiling, kForwardThreads, stream);
}

}  // namespace pixelgen::cuda
