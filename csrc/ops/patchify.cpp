// Bound by bytes: every number is read once and written once. One work item is a row of patches.
// The side that is written is walked in memory order; what is read for one row of patches (200 KB
// at 256 px) stays in the cache.
#include "patchify.h"

#include <cstring>

#include "../common/rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

// kP and kC: patch size and channels where they are known at compile time, else 0. A run of P
// pixels is then one or two vector moves, and the channels of a pixel are interleaved in registers.

// A row of patches, channel first: runs of P neighbours on both sides.
template <typename E, int kP, bool kToTokens>
inline void move_runs(const Patchify& a, E* x, E* tokens) {
  const int64_t P = kP > 0 ? kP : a.patch_size, C = a.x.size[1], cols = a.width / P;
  const auto move = [&](int64_t patch_col, int64_t c, int64_t row) {
    E* pixels = x + a.x.offset(0, c, row) + patch_col * P;
    E* values = tokens + a.tokens.offset(0, patch_col) + (c * P + row) * P;
    if (kToTokens)
      std::memcpy(values, pixels, P * sizeof(E));
    else
      std::memcpy(pixels, values, P * sizeof(E));
  };
  if (kToTokens) {
    for (int64_t patch_col = 0; patch_col < cols; ++patch_col)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t row = 0; row < P; ++row) move(patch_col, c, row);
  } else {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t row = 0; row < P; ++row)
        for (int64_t patch_col = 0; patch_col < cols; ++patch_col) move(patch_col, c, row);
  }
}

// A row of patches, channel last, of an image whose rows are dense.
template <typename E, int kP, int kC, bool kToTokens>
inline void interleave(const Patchify& a, E* x, E* tokens) {
  const int64_t P = kP > 0 ? kP : a.patch_size, C = kC > 0 ? kC : a.x.size[1], cols = a.width / P;
  const int64_t stride_c = a.x.stride[1];
  const auto move = [&](int64_t patch_col, int64_t row) {
    E* __restrict pixels = x + a.x.offset(0, 0, row) + patch_col * P;
    E* __restrict values = tokens + a.tokens.offset(0, patch_col) + row * P * C;
    for (int64_t col = 0; col < P; ++col) {
      for (int64_t c = 0; c < C; ++c) {
        if (kToTokens)
          values[col * C + c] = pixels[c * stride_c + col];
        else
          pixels[c * stride_c + col] = values[col * C + c];
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

// A row of patches with any strides on both sides, in either order.
template <typename E, bool kToTokens>
inline void move_strided(const Patchify& a, E* x, E* tokens) {
  const int64_t P = a.patch_size, C = a.x.size[1], step = a.tokens.stride[2];
  const bool is_last = a.channel_order == ChannelOrder::kLast;
  const int64_t stride_c = is_last ? step : P * P * step, stride_col = is_last ? C * step : step;
  for (int64_t row = 0; row < P; ++row) {
    for (int64_t w = 0; w < a.width; ++w) {
      E* pixel = x + a.x.offset(0, 0, row, w);
      E* value = tokens + a.tokens.offset(0, w / P) + (row * P + w % P) * stride_col;
      for (int64_t c = 0; c < C; ++c) {
        if (kToTokens)
          value[c * stride_c] = pixel[c * a.x.stride[1]];
        else
          pixel[c * a.x.stride[1]] = value[c * stride_c];
      }
    }
  }
}

template <typename E, int kP, bool kToTokens>
void move_all(const Patchify& a, int num_threads) {
  const int64_t P = a.patch_size, rows = a.height / P, cols = a.width / P;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < a.x.size[0] * rows; ++item) {
    const int64_t b = item / rows, patch_row = item % rows;
    E* x = a.x.as<E>() + a.x.offset(b, 0, patch_row * P);
    E* tokens = a.tokens.as<E>() + a.tokens.offset(b, patch_row * cols);
    if (a.x.stride[3] != 1 || a.tokens.stride[2] != 1)
      move_strided<E, kToTokens>(a, x, tokens);
    else if (a.channel_order == ChannelOrder::kFirst)
      move_runs<E, kP, kToTokens>(a, x, tokens);
    else if (a.x.size[1] == 3)
      interleave<E, kP, 3, kToTokens>(a, x, tokens);
    else
      interleave<E, kP, 0, kToTokens>(a, x, tokens);
  }
}

template <typename E, bool kToTokens>
void move_sized(const Patchify& a, int num_threads) {
  switch (a.patch_size) {
    case 2:
      return move_all<E, 2, kToTokens>(a, num_threads);
    case 4:
      return move_all<E, 4, kToTokens>(a, num_threads);
    case 16:
      return move_all<E, 16, kToTokens>(a, num_threads);
    case 32:
      return move_all<E, 32, kToTokens>(a, num_threads);
    default:
      return move_all<E, 0, kToTokens>(a, num_threads);
  }
}

// Numbers are moved, not computed with: their size is all that counts.
template <bool kToTokens>
Status move(const Patchify& a, int num_threads) {
  if (a.problem() != nullptr) return a.problem();
  if (a.x.size[1] == 0 || a.width == 0) return nullptr;
  if (a.x.dtype == DType::kFloat64)
    move_sized<uint64_t, kToTokens>(a, num_threads);
  else if (a.x.dtype == DType::kFloat32)
    move_sized<uint32_t, kToTokens>(a, num_threads);
  else
    move_sized<uint16_t, kToTokens>(a, num_threads);
  return nullptr;
}

}  // namespace

Status patchify_fwd(const PatchifyFwd& a, const Place& place) {
  return move<true>(a, place.num_threads);
}
Status unpatchify_fwd(const UnpatchifyFwd& a, const Place& place) {
  return move<false>(a, place.num_threads);
}

PIXELGEN_OPS(patchify, PIXELGEN_OP(patchify_fwd), PIXELGEN_OP(unpatchify_fwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
