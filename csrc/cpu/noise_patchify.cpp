// Bound by bytes, with Philox by arithmetic. The image and the noise are read once, tokens and
// clean tokens written once. One work item is a row of patches: read image row by image row into
// blocks that stay in the cache, then written patch by patch, so that both sides are walked in
// memory order.
#include "../noise_patchify.h"

#include <cstring>

#include "../math/flow.h"
#include "philox_rows.h"
#include "strided.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kPixels = 512;  // most columns of an image row at a time
constexpr int64_t kBlock =
    4096;  // most pixels of a block, per channel: a patch row of 256 px at P = 16

// n numbers of the noise of one sample from element `first` on, in `buffer` or in `floats`, which
// has room for 6 more (the groups of four that the first and the last belong to).
template <typename Real>
inline const Real* philox_piece(const math::PhiloxStream& stream, int64_t first, float* floats,
                                Real* buffer, int64_t n) {
  const int64_t first_group = first / 4;
  fill_normal(stream, first_group, ceil_div(first + n, 4) - first_group, floats);
  return as_real<Real>(floats + first % 4, buffer, n);
}

// Writes a block of kC channels, values[j] being channel c + j: `rows` rows of `n` columns, `width`
// apart, from row `first_row` and column `first_col` of a row of patches on, which starts at
// `tokens`.
template <typename T, int kC>
inline void store_block(const NoisePatchifyParams& p, bool channel_last, int64_t c,
                        int64_t first_row, int64_t rows, int64_t first_col, int64_t n,
                        int64_t width, const T (&values)[kC][kBlock], T* tokens) {
  const int64_t P = p.P, D = p.C * P * P;
  for (int64_t done = 0; done < n;) {
    const int64_t patch = (first_col + done) / P, col = (first_col + done) % P;
    const int64_t run = min_of(P - col, n - done);
    T* token = tokens + patch * D;
    if (!channel_last) {
      for (int j = 0; j < kC; ++j) {
        for (int64_t row = 0; row < rows; ++row) {
          T* target = token + ((c + j) * P + first_row + row) * P + col;
          const T* source = values[j] + row * width + done;
          if (run == 16)  // a constant size is one vector move
            std::memcpy(target, source, 16 * sizeof(T));
          else
            std::memcpy(target, source, run * sizeof(T));
        }
      }
    } else {
      const int64_t stride = kC > 1 ? kC : p.C;
      for (int64_t row = 0; row < rows; ++row) {
        T* __restrict target = token + ((first_row + row) * P + col) * p.C + c;
        for (int64_t i = 0; i < run; ++i)
          for (int j = 0; j < kC; ++j) target[i * stride + j] = values[j][row * width + done + i];
      }
    }
    done += run;
  }
}

// kC channels at a time: 3 where there are 3, so that channels-last patches are interleaved in
// registers, else 1.
template <typename T, typename Real, int kC>
void noise_rows(const NoisePatchifyParams& p, int num_threads) {
  using Clean = typename Stats<T>::type;
  const int64_t P = p.P, patch_rows = p.H / P, row_size = p.W * p.C * P;
  const int64_t width = min_of(p.W, P <= kPixels ? kPixels / P * P : kPixels);
  const int64_t rows = min_of(P, kBlock / width);
  const Real noise_scale = Real(p.noise_scale);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < p.B * patch_rows; ++item) {
    const int64_t b = item / patch_rows, patch_row = item % patch_rows;
    const Real t = number<Real>(p.t, p.t_dtype, b * p.t_stride);
    math::PhiloxStream stream{};
    if (p.noise == nullptr) {
      stream = math::philox_stream(
          p.seed, p.step, static_cast<const int64_t*>(p.sample_index)[b * p.sample_index_stride],
          0);
    }
    T* tokens = static_cast<T*>(p.tokens) + item * row_size;
    Clean* clean = p.clean == nullptr ? nullptr : static_cast<Clean*>(p.clean) + item * row_size;
    alignas(64) Real x_buffer[kPixels], noise_buffer[kPixels];
    alignas(64) float philox_buffer[kPixels + 6];
    alignas(64) T x_t_values[kC][kBlock];
    alignas(64) Clean x_values[kC][kBlock];

    // columns [w, w + n) of image row h of channel c into the block's channel j, from `at` on
    const auto noise_piece = [&](int64_t c, int j, int64_t h, int64_t w, int64_t n, int64_t at) {
      const int64_t image_offset =
          b * p.image_stride_b + c * p.image_stride_c + h * p.image_stride_h + w * p.image_stride_w;
      const Real* x = x_buffer;
      if (p.image_is_uint8)
        gather(static_cast<const uint8_t*>(p.image) + image_offset, p.image_stride_w, x_buffer, n,
               [](uint8_t value) { return math::pixel(Real(value)); });
      else
        x = as_real(p.image, p.image_dtype, image_offset, p.image_stride_w, x_buffer, n);
      const Real* noise =
          p.noise == nullptr
              ? philox_piece(stream, (c * p.H + h) * p.W + w, philox_buffer, noise_buffer, n)
              : as_real(p.noise, p.noise_dtype,
                        b * p.noise_stride_b + c * p.noise_stride_c + h * p.noise_stride_h +
                            w * p.noise_stride_w,
                        p.noise_stride_w, noise_buffer, n);
      T* x_t = x_t_values[j] + at;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        math::from_real(math::interpolate(x[i], noise[i] * noise_scale, t), &x_t[i]);
      }
      if (clean != nullptr) store_row(x, x_values[j] + at, n);
    };

    for (int64_t c = 0; c < p.C; c += kC) {
      for (int64_t row = 0; row < P; row += rows) {
        const int64_t num_rows = min_of(rows, P - row);
        for (int64_t w = 0; w < p.W; w += width) {
          const int64_t n = min_of(width, p.W - w);
          for (int64_t r = 0; r < num_rows; ++r)
            for (int j = 0; j < kC; ++j)
              noise_piece(c + j, j, patch_row * P + row + r, w, n, r * width);
          store_block<T, kC>(p, p.channel_last, c, row, num_rows, w, n, width, x_t_values, tokens);
          if (clean != nullptr)
            store_block<Clean, kC>(p, p.clean_channel_last, c, row, num_rows, w, n, width, x_values,
                                   clean);
        }
      }
    }
  }
}

template <typename T, typename Real>
void noise_channels(const NoisePatchifyParams& p, int num_threads) {
  if (p.C == 3)
    noise_rows<T, Real, 3>(p, num_threads);
  else
    noise_rows<T, Real, 1>(p, num_threads);
}

}  // namespace

Status noise_patchify(const NoisePatchifyParams& p, int num_threads) {
  const bool is_double = (!p.image_is_uint8 && p.image_dtype == DType::kFloat64) ||
                         (p.noise != nullptr && p.noise_dtype == DType::kFloat64) ||
                         p.out_dtype == DType::kFloat64;
  with_element_type(p.out_dtype, [&](auto element) {
    using T = decltype(element);
    if (is_double)
      noise_channels<T, double>(p, num_threads);
    else
      noise_channels<T, typename Stats<T>::type>(p, num_threads);
  });
  return nullptr;
}

}  // namespace pixelgen::cpu::PIXELGEN_ISA
