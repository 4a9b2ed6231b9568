// Bound by bytes: every number is read once and written once. Threads follow the image: a block row
// of threads walks one image row, each thread moves kPixels neighbouring pixels of every channel,
// so the image side is coalesced. The token side is a run of P elements (channel first), or P * C
// elements that the channels fill together in L2 (channel last).
#include "../common/vec.cuh"
#include "patchify.h"

namespace pixelgen::cuda {
namespace {

constexpr int kThreadsPerRow = 32;  // an image row of 256 pixels is 32 packs of 8 bf16
constexpr int kRowsPerBlock = 8;
constexpr int64_t kMaxSide = 0x7fffffff;

// kPixels neighbours are one pack on the image side, and on the token side too when kPackTokens.
// Tokens whose last dimension has a stride are for one pixel at a time.
template <typename E, int kPixels, bool kPackTokens, bool kToTokens>
__global__ void __launch_bounds__(kThreadsPerRow* kRowsPerBlock)
    patchify_kernel(const Patchify a, int64_t first_row, int64_t num_rows) {
  const int64_t row_index = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row_index >= num_rows) return;
  const unsigned P = unsigned(a.patch_size), W = unsigned(a.width);
  const int64_t b = (first_row + row_index) / a.height, h = (first_row + row_index) % a.height;
  const bool is_last = a.channel_order == ChannelOrder::kLast;
  const int64_t C = a.x.size[1], step = kPixels > 1 ? 1 : a.tokens.stride[2];
  const int64_t stride_c = is_last ? step : P * P * step, stride_col = is_last ? C * step : step;
  E* x = a.x.as<E>() + a.x.offset(b, 0, h);
  E* tokens = a.tokens.as<E>() + a.tokens.offset(b, h / P * (W / P)) + h % P * P * stride_col;

  for (unsigned w = threadIdx.x * kPixels; w < W; w += kThreadsPerRow * kPixels) {
    E* pixels = x + w * a.x.stride[3];
    E* values = tokens + a.tokens.offset(0, w / P) + w % P * stride_col;
#pragma unroll 1  // unrolled it needs more registers than full occupancy leaves
    for (int64_t c = 0; c < C; ++c) {
      using Pixels = Pack<E, kPixels>;
      Pixels pack;
      if constexpr (kToTokens) {
        pack = *reinterpret_cast<const Pixels*>(pixels);
        if constexpr (kPackTokens) {
          *reinterpret_cast<Pixels*>(values) = pack;
        } else {
#pragma unroll
          for (int i = 0; i < kPixels; ++i) values[i * stride_col] = pack.values[i];
        }
      } else {
        if constexpr (kPackTokens) {
          pack = *reinterpret_cast<const Pixels*>(values);
        } else {
#pragma unroll
          for (int i = 0; i < kPixels; ++i) pack.values[i] = values[i * stride_col];
        }
        *reinterpret_cast<Pixels*>(pixels) = pack;
      }
      pixels += a.x.stride[1];
      values += stride_c;
    }
  }
}

template <typename E, int kPixels, bool kPackTokens, bool kToTokens>
Status launch_all(const Patchify& a, const Place& place) {
  const int64_t rows = a.x.size[0] * a.height;
  // one launch unless there are more than 2^31 blocks
  for (int64_t first = 0; first < rows; first += kMaxBlocks * kRowsPerBlock) {
    const int64_t left = rows - first;
    const int64_t count = left < kMaxBlocks * kRowsPerBlock ? left : kMaxBlocks * kRowsPerBlock;
    const Status status = launch(patchify_kernel<E, kPixels, kPackTokens, kToTokens>,
                                 unsigned(ceil_div(count, kRowsPerBlock)),
                                 dim3(kThreadsPerRow, kRowsPerBlock), place, a, first, count);
    if (status != nullptr) return status;
  }
  return nullptr;
}

template <typename E, bool kToTokens>
Status launch_sized(const Patchify& a, const Place& place) {
  constexpr int kPixels = 16 / sizeof(E);
  const bool pack_image =
      a.patch_size % kPixels == 0 && a.tokens.stride[2] == 1 && packs_are_aligned(a.x, kPixels);
  if (!pack_image) return launch_all<E, 1, false, kToTokens>(a, place);
  // P % kPixels == 0, so rows of a patch start at multiples of a pack
  const bool pack_tokens = (a.channel_order == ChannelOrder::kFirst || a.x.size[1] == 1) &&
                           packs_are_aligned(a.tokens, kPixels);
  if (!pack_tokens) return launch_all<E, kPixels, false, kToTokens>(a, place);
  return launch_all<E, kPixels, true, kToTokens>(a, place);
}

// Numbers are moved, not computed with: their size is all that counts.
template <bool kToTokens>
Status launch_any(const Patchify& a, const Place& place) {
  if (a.problem() != nullptr) return a.problem();
  if (a.height > kMaxSide || a.width > kMaxSide) return "height and width must be below 2^31";
  if (a.x.size[1] == 0 || a.width == 0) return nullptr;
  switch (element_size(a.x.dtype)) {
    case 8:
      return launch_sized<uint64_t, kToTokens>(a, place);
    case 4:
      return launch_sized<uint32_t, kToTokens>(a, place);
    default:
      return launch_sized<uint16_t, kToTokens>(a, place);
  }
}

}  // namespace

Status patchify_fwd(const PatchifyFwd& a, const Place& place) { return launch_any<true>(a, place); }
Status unpatchify_fwd(const UnpatchifyFwd& a, const Place& place) {
  return launch_any<false>(a, place);
}

PIXELGEN_OPS(patchify, PIXELGEN_OP(patchify_fwd), PIXELGEN_OP(unpatchify_fwd))

}  // namespace pixelgen::cuda
