// Bound by bytes, with Philox by arithmetic. The image and the noise are read once, tokens and
// clean tokens written once. One work item is a row of patches: read image row by image row into
// blocks that stay in the cache, then written patch by patch, so that both sides are walked in
// memory order.
// Random numbers (math/normal.h) are the same bits everywhere: no sum is reordered or contracted.
// flags: -fno-associative-math -ffp-contract=off
#include "noise_patchify.h"

#include <cstring>

#include "../common/philox_rows.h"
#include "../common/strided.h"
#include "../math/flow.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kPixels = 512;  // most columns of an image row at a time
// Most pixels of a block, per channel: a patch row of 256 px at P = 16.
constexpr int64_t kBlock = 4096;

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
inline void store_block(const NoisePatchifyFwd& a, ChannelOrder order, int64_t c, int64_t first_row,
                        int64_t rows, int64_t first_col, int64_t n, int64_t width,
                        const T (&values)[kC][kBlock], T* tokens) {
  const int64_t P = a.patch_size, C = a.image.size[1];
  for (int64_t done = 0; done < n;) {
    const int64_t patch = (first_col + done) / P, col = (first_col + done) % P;
    const int64_t run = min_of(P - col, n - done);
    T* token = tokens + patch * C * P * P;
    if (order == ChannelOrder::kFirst) {
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
      const int64_t stride = kC > 1 ? kC : C;
      for (int64_t row = 0; row < rows; ++row) {
        T* __restrict target = token + ((first_row + row) * P + col) * C + c;
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
void noise_rows(const NoisePatchifyFwd& a, int num_threads) {
  using Clean = typename Stats<T>::type;
  const int64_t C = a.image.size[1], H = a.image.size[2], W = a.image.size[3], P = a.patch_size;
  const int64_t patch_rows = H / P, row_size = W * C * P;
  const int64_t width = min_of(W, P <= kPixels ? kPixels / P * P : kPixels);
  const int64_t rows = min_of(P, kBlock / width);
  const Real noise_scale = Real(a.noise_scale);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < a.image.size[0] * patch_rows; ++item) {
    const int64_t b = item / patch_rows, patch_row = item % patch_rows;
    const Real t = number<Real>(a.t, b);
    math::PhiloxStream stream{};
    if (a.noise.data == nullptr) {
      const int64_t sample = a.sample_index.as<int64_t>()[a.sample_index.offset(b)];
      stream = math::philox_stream(a.seed, a.step, sample, 0);
    }
    T* tokens = a.tokens.as<T>() + item * row_size;
    Clean* clean = a.clean.data == nullptr ? nullptr : a.clean.as<Clean>() + item * row_size;
    alignas(64) Real x_buffer[kPixels], noise_buffer[kPixels];
    alignas(64) float philox_buffer[kPixels + 6];
    alignas(64) T x_t_values[kC][kBlock];
    alignas(64) Clean x_values[kC][kBlock];

    // columns [w, w + n) of image row h of channel c into the block's channel j, from `at` on
    const auto noise_piece = [&](int64_t c, int j, int64_t h, int64_t w, int64_t n, int64_t at) {
      const int64_t image_offset = a.image.offset(b, c, h, w);
      const Real* x = x_buffer;
      if (a.image.dtype == DType::kUInt8)
        gather(a.image.as<uint8_t>() + image_offset, a.image.stride[3], x_buffer, n,
               [](uint8_t value) { return math::pixel(Real(value)); });
      else
        x = as_real(a.image.data, a.image.dtype, image_offset, a.image.stride[3], x_buffer, n);
      const Real* noise =
          a.noise.data == nullptr
              ? philox_piece(stream, (c * H + h) * W + w, philox_buffer, noise_buffer, n)
              : as_real(a.noise.data, a.noise.dtype, a.noise.offset(b, c, h, w), a.noise.stride[3],
                        noise_buffer, n);
      T* x_t = x_t_values[j] + at;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        math::from_real(math::interpolate(x[i], noise[i] * noise_scale, t), &x_t[i]);
      }
      if (clean != nullptr) store_row(x, x_values[j] + at, n);
    };

    for (int64_t c = 0; c < C; c += kC) {
      for (int64_t row = 0; row < P; row += rows) {
        const int64_t num_rows = min_of(rows, P - row);
        for (int64_t w = 0; w < W; w += width) {
          const int64_t n = min_of(width, W - w);
          for (int64_t r = 0; r < num_rows; ++r)
            for (int j = 0; j < kC; ++j)
              noise_piece(c + j, j, patch_row * P + row + r, w, n, r * width);
          store_block<T, kC>(a, a.channel_order, c, row, num_rows, w, n, width, x_t_values, tokens);
          if (clean != nullptr)
            store_block<Clean, kC>(a, a.clean_channel_order, c, row, num_rows, w, n, width,
                                   x_values, clean);
        }
      }
    }
  }
}

template <typename T, typename Real>
void noise_channels(const NoisePatchifyFwd& a, int num_threads) {
  if (a.image.size[1] == 3)
    noise_rows<T, Real, 3>(a, num_threads);
  else
    noise_rows<T, Real, 1>(a, num_threads);
}

}  // namespace

Status noise_patchify_fwd(const NoisePatchifyFwd& a, const Place& place) {
  if (a.problem() != nullptr) return a.problem();
  if (a.tokens.numel == 0) return nullptr;
  with_element_type(a.tokens.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.is_double())
      noise_channels<T, double>(a, place.num_threads);
    else
      noise_channels<T, typename Stats<T>::type>(a, place.num_threads);
  });
  return nullptr;
}

PIXELGEN_OPS(noise_patchify, PIXELGEN_OP(noise_patchify_fwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
