// x = image / 127.5 - 1 for uint8, else image           x_t = t x + (1 - t) noise_scale noise
// tokens = patchify(x_t), clean = patchify(x); see patchify.h for the two orders inside a patch.
// Without `noise` it is the Philox noise of (seed, step, sample_index, stream 0), element by
// element in the order (channel, row, column) of an image. Arithmetic in fp32 (fp64 when image,
// noise or tokens are fp64).
#pragma once

#include "common.h"

namespace pixelgen {

struct NoisePatchifyParams {
  const void* image;         // (B, C, H, W), strides below
  const void* noise;         // (B, C, H, W), strides below, or null
  const void* t;             // (B,)
  const void* sample_index;  // (B,) int64; null when there is noise
  void* tokens;              // (B, H / P * W / P, C * P * P), dense
  void* clean;               // as tokens, or null; fp32, fp64 when tokens are fp64
  int64_t B, C, H, W, P;     // P divides H and W
  int64_t image_stride_b, image_stride_c, image_stride_h, image_stride_w;
  int64_t noise_stride_b, noise_stride_c, noise_stride_h, noise_stride_w;
  int64_t t_stride, sample_index_stride;
  int64_t seed, step;
  double noise_scale;
  bool image_is_uint8;  // then image_dtype does not count
  DType image_dtype, noise_dtype, t_dtype, out_dtype;
  bool channel_last, clean_channel_last;
};

namespace cpu {
Status noise_patchify(const NoisePatchifyParams& p, int num_threads);
}  // namespace cpu

// Enqueues on `stream`. Never allocates, never synchronises. Image, noise and tokens are not fp64.
namespace cuda {
Status noise_patchify(const NoisePatchifyParams& p, void* stream);
}  // namespace cuda

}  // namespace pixelgen
