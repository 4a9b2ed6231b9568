// Bound by bytes: every number is read once and written once. One work item is a row of patches.
// The side that is written is walked in memory order; what is read for one row of patches (200 KB
// at 256 px) stays in the cache.
#include "../patchify.h"

#include <cstring>

#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// kP and kC: patch size and channels where they are known at compile time, else 0. A run of P
// pixels is then one or two vector moves, and the channels of a pixel are interleaved in registers.

// A row of patches, channel first: runs of P neighbours on both sides.
template <typename E, int kP, bool kToTokens>
inline void move_runs(const PatchifyParams& p, E* image, E* tokens) {
  const int64_t P = kP > 0 ? kP : p.P, cols = p.W / P;
  const auto move = [&](int64_t patch_col, int64_t c, int64_t row) {
    E* pixels = image + c * p.image_stride_c + row * p.image_stride_h + patch_col * P;
    E* values = tokens + patch_col * p.tokens_stride_t + (c * P + row) * P;
    if (kToTokens)
      std::memcpy(values, pixels, P * sizeof(E));
    else
      std::memcpy(pixels, values, P * sizeof(E));
  };
  if (kToTokens) {
    for (int64_t patch_col = 0; patch_col < cols; ++patch_col)
      for (int64_t c = 0; c < p.C; ++c)
        for (int64_t row = 0; row < P; ++row) move(patch_col, c, row);
  } else {
    for (int64_t c = 0; c < p.C; ++c)
      for (int64_t row = 0; row < P; ++row)
        for (int64_t patch_col = 0; patch_col < cols; ++patch_col) move(patch_col, c, row);
  }
}

// A row of patches, channel last, of an image whose rows are dense.
template <typename E, int kP, int kC, bool kToTokens>
inline void interleave(const PatchifyParams& p, E* image, E* tokens) {
  const int64_t P = kP > 0 ? kP : p.P, C = kC > 0 ? kC : p.C, cols = p.W / P;
  const auto move = [&](int64_t patch_col, int64_t row) {
    E* __restrict pixels = image + row * p.image_stride_h + patch_col * P;
    E* __restrict values = tokens + patch_col * p.tokens_stride_t + row * P * C;
    for (int64_t col = 0; col < P; ++col) {
      for (int64_t c = 0; c < C; ++c) {
        if (kToTokens)
          values[col * C + c] = pixels[c * p.image_stride_c + col];
        else
          pixels[c * p.image_stride_c + col] = values[col * C + c];
      }
    }
  };
  if (kToTokens) {
    for (int64_t patch_col = 0; patch_col < cols; ++patch_col)
      for (int64_t row = 0; row < P; ++row) move(patch_col, row);
  } else {
    for (int64_t row = 0; row < P; ++row)
      for (int64_t patch_col = 0; patch_col < cols; ++patch_col) move(patch_col, row);
  }
}

// A row of patches of an image with any strides, in either order.
template <typename E, bool kToTokens>
inline void move_strided(const PatchifyParams& p, E* image, E* tokens) {
  const int64_t stride_c = p.channel_last ? 1 : p.P * p.P;
  const int64_t stride_col = p.channel_last ? p.C : 1;
  const int64_t stride_row = p.P * stride_col;
  for (int64_t row = 0; row < p.P; ++row) {
    for (int64_t w = 0; w < p.W; ++w) {
      E* pixel = image + row * p.image_stride_h + w * p.image_stride_w;
      E* value = tokens + w / p.P * p.tokens_stride_t + row * stride_row + w % p.P * stride_col;
      for (int64_t c = 0; c < p.C; ++c) {
        if (kToTokens)
          value[c * stride_c] = pixel[c * p.image_stride_c];
        else
          pixel[c * p.image_stride_c] = value[c * stride_c];
      }
    }
  }
}

template <typename E, int kP, bool kToTokens>
void move_all(const PatchifyParams& p, int num_threads) {
  const int64_t rows = p.H / p.P, cols = p.W / p.P;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < p.B * rows; ++item) {
    const int64_t b = item / rows, patch_row = item % rows;
    E* image = static_cast<E*>(p.image) + b * p.image_stride_b + patch_row * p.P * p.image_stride_h;
    E* tokens =
        static_cast<E*>(p.tokens) + b * p.tokens_stride_b + patch_row * cols * p.tokens_stride_t;
    if (p.image_stride_w != 1)
      move_strided<E, kToTokens>(p, image, tokens);
    else if (!p.channel_last)
      move_runs<E, kP, kToTokens>(p, image, tokens);
    else if (p.C == 3)
      interleave<E, kP, 3, kToTokens>(p, image, tokens);
    else
      interleave<E, kP, 0, kToTokens>(p, image, tokens);
  }
}

template <typename E, bool kToTokens>
void move_sized(const PatchifyParams& p, int num_threads) {
  switch (p.P) {
    case 2:
      return move_all<E, 2, kToTokens>(p, num_threads);
    case 4:
      return move_all<E, 4, kToTokens>(p, num_threads);
    case 16:
      return move_all<E, 16, kToTokens>(p, num_threads);
    case 32:
      return move_all<E, 32, kToTokens>(p, num_threads);
    default:
      return move_all<E, 0, kToTokens>(p, num_threads);
  }
}

template <bool kToTokens>
Status move(const PatchifyParams& p, int num_threads) {
  switch (p.element_size) {
    case 2:
      move_sized<uint16_t, kToTokens>(p, num_threads);
      return nullptr;
    case 4:
      move_sized<uint32_t, kToTokens>(p, num_threads);
      return nullptr;
    case 8:
      move_sized<uint64_t, kToTokens>(p, num_threads);
      return nullptr;
    default:
      return "element_size must be 2, 4 or 8";
  }
}

}  // namespace

Status patchify(const PatchifyParams& p, int num_threads) { return move<true>(p, num_threads); }
Status unpatchify(const PatchifyParams& p, int num_threads) { return move<false>(p, num_threads); }

}  // namespace pixelgen::cpu::PIXELGEN_ISA
