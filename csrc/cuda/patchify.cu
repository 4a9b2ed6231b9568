// Bound by bytes: every number is read once and written once. Threads follow the image: a block row
// of threads walks one image row, each thread moves kPixels neighbouring pixels of every channel,
// so the image side is coalesced. The token side is a run of P elements (channel first), or P * C
// elements that the channels fill together in L2 (channel last).
#include "../patchify.h"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kThreadsPerRow = 32;  // an image row of 256 pixels is 32 packs of 8 bf16
constexpr int kRowsPerBlock = 8;

// kPixels neighbours are one pack on the image side, and on the token side too when kPackTokens.
template <typename E, int kPixels, bool kPackTokens, bool kToTokens>
__global__ void __launch_bounds__(kThreadsPerRow* kRowsPerBlock)
    patchify_kernel(const PatchifyParams p, int64_t first_row, int64_t num_rows) {
  const int64_t row_index = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row_index >= num_rows) return;
  const int P = int(p.P);
  const int64_t b = (first_row + row_index) / p.H;
  const int64_t h = (first_row + row_index) % p.H;
  const int64_t stride_c = p.channel_last ? 1 : int64_t(P) * P;
  const int64_t stride_col = p.channel_last ? p.C : 1;
  const int64_t stride_row = p.channel_last ? P * p.C : P;
  E* image = static_cast<E*>(p.image) + b * p.image_stride_b + h * p.image_stride_h;
  E* tokens = static_cast<E*>(p.tokens) + b * p.tokens_stride_b +
              (h / P) * (p.W / P) * p.tokens_stride_t + (h % P) * stride_row;

  const int W = int(p.W);
  for (int w = int(threadIdx.x) * kPixels; w < W; w += kThreadsPerRow * kPixels) {
    E* pixels = image + w * p.image_stride_w;
    E* values = tokens + (w / P) * p.tokens_stride_t + (w % P) * stride_col;
#pragma unroll 1  // unrolled it needs more registers than full occupancy leaves
    for (int64_t c = 0; c < p.C; ++c) {
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
      pixels += p.image_stride_c;
      values += stride_c;
    }
  }
}

template <typename E, int kPixels, bool kPackTokens, bool kToTokens>
Status launch_all(const PatchifyParams& p, cudaStream_t stream) {
  const int64_t rows = p.B * p.H;
  // one launch unless there are more than 2^31 blocks
  for (int64_t first = 0; first < rows; first += kMaxBlocks * kRowsPerBlock) {
    const int64_t left = rows - first;
    const int64_t count = left < kMaxBlocks * kRowsPerBlock ? left : kMaxBlocks * kRowsPerBlock;
    const Status status = launch(patchify_kernel<E, kPixels, kPackTokens, kToTokens>,
                                 unsigned(ceil_div(count, kRowsPerBlock)),
                                 dim3(kThreadsPerRow, kRowsPerBlock), stream, p, first, count);
    if (status != nullptr) return status;
  }
  return nullptr;
}

// Whether packs of `bytes` bytes may be accessed at base + any combination of the strides (in
// elements).
bool aligned(const void* base, int element_size, int64_t bytes, int64_t a, int64_t b, int64_t c) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && a * element_size % bytes == 0 &&
         b * element_size % bytes == 0 && c * element_size % bytes == 0;
}

template <typename E, bool kToTokens>
Status launch_sized(const PatchifyParams& p, cudaStream_t stream) {
  constexpr int kPixels = 16 / sizeof(E);
  const bool pack_image =
      p.P % kPixels == 0 && p.image_stride_w == 1 &&
      aligned(p.image, sizeof(E), 16, p.image_stride_b, p.image_stride_c, p.image_stride_h);
  if (!pack_image) return launch_all<E, 1, false, kToTokens>(p, stream);
  // P % kPixels == 0, so rows of a patch start at multiples of a pack
  const bool pack_tokens =
      (!p.channel_last || p.C == 1) &&
      aligned(p.tokens, sizeof(E), 16, p.tokens_stride_b, p.tokens_stride_t, 0);
  if (!pack_tokens) return launch_all<E, kPixels, false, kToTokens>(p, stream);
  return launch_all<E, kPixels, true, kToTokens>(p, stream);
}

template <bool kToTokens>
Status launch_any(const PatchifyParams& p, void* stream) {
  if (p.B == 0 || p.C == 0 || p.H == 0 || p.W == 0) return nullptr;  // no blocks would be an error
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.element_size) {
    case 2:
      return launch_sized<uint16_t, kToTokens>(p, cuda_stream);
    case 4:
      return launch_sized<uint32_t, kToTokens>(p, cuda_stream);
    case 8:
      return launch_sized<uint64_t, kToTokens>(p, cuda_stream);
    default:
      return "element_size must be 2, 4 or 8";
  }
}

}  // namespace

Status patchify(const PatchifyParams& p, void* stream) { return launch_any<true>(p, stream); }
Status unpatchify(const PatchifyParams& p, void* stream) { return launch_any<false>(p, stream); }

}  // namespace pixelgen::cuda
