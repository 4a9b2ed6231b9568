// tokens[b, (h / P) * (W / P) + w / P, offset(c, h % P, w % P)] = x[b, c, h, w], and the way back.
// offset(c, row, col) = (c * P + row) * P + col (channel first) or (row * P + col) * C + c (last).
#pragma once

#include "common.h"

namespace pixelgen {

struct PatchifyParams {
  void* image;            // (B, C, H, W), strides below
  void* tokens;           // (B, T, P * P * C), last dimension contiguous, strides below
  int64_t B, C, H, W, P;  // P divides H and W
  int64_t image_stride_b, image_stride_c, image_stride_h, image_stride_w;
  int64_t tokens_stride_b, tokens_stride_t;
  int element_size;   // bytes: 2, 4 or 8; numbers are moved, not computed with
  bool channel_last;  // order inside a patch vector
};

namespace cpu {
Status patchify(const PatchifyParams& p, int num_threads);    // image -> tokens
Status unpatchify(const PatchifyParams& p, int num_threads);  // tokens -> image
}  // namespace cpu

// Enqueue on `stream`. Never allocate, never synchronise.
namespace cuda {
Status patchify(const PatchifyParams& p, void* stream);
Status unpatchify(const PatchifyParams& p, void* stream);
}  // namespace cuda

}  // namespace pixelgen
