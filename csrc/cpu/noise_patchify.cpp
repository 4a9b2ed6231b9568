// Bound by bytes, with Philox by arithmetic. The image and the noise are read once, tokens and
// clean tokens written once. One work item is a row of patches, walked image row by image row in
// pieces that stay in the first-level cache; what a piece writes is spread over a few hundred KB,
// which the second-level cache puts together.
#include "../noise_patchify.h"

#include <cstring>

#include "../math/flow.h"
#include "philox_rows.h"
#include "strided.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kPixels = 512;  // most columns of an image row at a time

// n numbers of the noise of one sample from element `first` on, in `buffer` or in `floats`, which
// has room for 6 more (the groups of four that the first and the last belong to).
template <typename Real>
inline const Real* philox_piece(const math::PhiloxStream& stream, int64_t first, float* floats,
                                Real* buffer, int64_t n) {
  const int64_t first_group = first / 4;
  fill_normal(stream, first_group, ceil_div(first + n, 4) - first_group, floats);
  return as_real<Real>(floats + first % 4, buffer, n);
}

// Writes kC channels of one piece, values[j] being channel c + j: the columns first_col to
// first_col + n - 1 of row `row` of a row of patches, which starts at `tokens`.
template <typename T, int kC>
inline void store_piece(const NoisePatchifyParams& p, bool channel_last, int64_t c, int64_t row,
                        int64_t first_col, int64_t n, const T (&values)[kC][kPixels], T* tokens) {
  const int64_t P = p.P, D = p.C * P * P;
  for (int64_t done = 0; done < n;) {
    const int64_t patch = (first_col + done) / P, col = (first_col + done) % P;
    const int64_t run = min_of(P - col, n - done);
    T* token = tokens + patch * D;
    if (!channel_last) {
      for (int j = 0; j < kC; ++j) {
        T* target = token + ((c + j) * P + row) * P + col;
        if (run == 16)  // a constant size is one vector move
          std::memcpy(target, values[j] + done, 16 * sizeof(T));
        else
          std::memcpy(target, values[j] + done, run * sizeof(T));
      }
    } else {
      T* __restrict target = token + (row * P + col) * p.C + c;
      const int64_t stride = kC > 1 ? kC : p.C;
      for (int64_t i = 0; i < run; ++i)
        for (int j = 0; j < kC; ++j) target[i * stride + j] = values[j][done + i];
    }
    done += run;
  }
}

// kC channels at a time: 3 where there are 3, so that channels-last patches are interleaved in
// registers, else 1.
template <typename T, typename Real, int kC>
void noise_rows(const NoisePatchifyParams& p, int num_threads) {
  const int64_t P = p.P, patch_rows = p.H / P, token_size = p.C * P * P;
  const int64_t patches_per_row = p.W / P;
  const int64_t width = P <= kPixels ? kPixels / P * P : kPixels;
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
    T* tokens = static_cast<T*>(p.tokens) + item * patches_per_row * token_size;
    T* clean = p.clean == nullptr ? nullptr
                                  : static_cast<T*>(p.clean) + item * patches_per_row * token_size;
    alignas(64) Real x_buffer[kPixels], noise_buffer[kPixels];
    alignas(64) float philox_buffer[kPixels + 6];
    alignas(64) T x_t_values[kC][kPixels], x_values[kC][kPixels];
    for (int64_t c = 0; c < p.C; c += kC) {
      for (int64_t row = 0; row < P; ++row) {
        const int64_t h = patch_row * P + row;
        for (int64_t w = 0; w < p.W; w += width) {
          const int64_t n = min_of(width, p.W - w);
          for (int j = 0; j < kC; ++j) {
            const int64_t image_offset = b * p.image_stride_b + (c + j) * p.image_stride_c +
                                         h * p.image_stride_h + w * p.image_stride_w;
            const Real* x = x_buffer;
            if (p.image_is_uint8)
              gather(static_cast<const uint8_t*>(p.image) + image_offset, p.image_stride_w,
                     x_buffer, n, [](uint8_t value) { return math::pixel(Real(value)); });
            else
              x = as_real(p.image, p.image_dtype, image_offset, p.image_stride_w, x_buffer, n);
            const Real* noise = p.noise == nullptr
                                    ? philox_piece(stream, ((c + j) * p.H + h) * p.W + w,
                                                   philox_buffer, noise_buffer, n)
                                    : as_real(p.noise, p.noise_dtype,
                                              b * p.noise_stride_b + (c + j) * p.noise_stride_c +
                                                  h * p.noise_stride_h + w * p.noise_stride_w,
                                              p.noise_stride_w, noise_buffer, n);
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
              math::from_real(math::interpolate(x[i], noise[i] * noise_scale, t),
                              &x_t_values[j][i]);
            }
            if (clean != nullptr) store_row(x, x_values[j], n);
          }
          store_piece<T, kC>(p, p.channel_last, c, row, w, n, x_t_values, tokens);
          if (clean != nullptr)
            store_piece<T, kC>(p, p.clean_channel_last, c, row, w, n, x_values, clean);
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
