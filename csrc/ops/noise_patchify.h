// x = image / 127.5 - 1 for uint8, else image           x_t = t x + (1 - t) noise_scale noise
// tokens = patchify(x_t), clean = patchify(x); see patchify.h for the two orders inside a patch.
// Without `noise` it is the Philox noise of (seed, step, sample_index, stream 0), element by
// element in the order (channel, row, column) of an image. Arithmetic in fp32 (fp64 when image,
// noise or tokens are fp64; CUDA does not have it).
#pragma once

#include "patchify.h"

namespace pixelgen {

struct NoisePatchifyFwd {
  Pixels<4> image;       // (B, C, H, W)
  Tensor<1> t;           // (B,)
  Optional<4> noise;     // (B, C, H, W)
  Indices sample_index;  // (B,); None when there is noise
  Dense tokens;          // (B, H / P * W / P, C * P * P)
  Dense clean;           // as tokens, or empty; fp32, fp64 when tokens are fp64
  int64_t patch_size, seed, step;
  double noise_scale;
  ChannelOrder channel_order, clean_channel_order;
  PIXELGEN_ARGUMENTS(image, t, noise, sample_index, tokens, clean, patch_size, seed, step,
                     noise_scale, channel_order, clean_channel_order)

  PIXELGEN_MEMBER bool is_double() const {
    return image.dtype == DType::kFloat64 || noise.dtype == DType::kFloat64 ||
           tokens.dtype == DType::kFloat64;
  }
  PIXELGEN_MEMBER Status problem() const {
    const int64_t B = image.size[0], C = image.size[1], H = image.size[2], W = image.size[3];
    if (patch_size < 1 || patch_size > kMaxPatchSize || H % patch_size != 0 || W % patch_size != 0)
      return "patch_size must divide height and width";
    if (!t.fits(B)) return "t must have a number per image";
    if ((noise.data == nullptr) == (sample_index.data == nullptr))
      return "takes either noise or sample_index";
    if (!noise.fits(B, C, H, W)) return "noise must have the shape of image";
    if (!sample_index.fits(B)) return "sample_index must have a number per image";
    if (!tokens.holds(B * C * H * W, tokens.dtype)) return "tokens must be as many as pixels";
    const bool is_wide = tokens.dtype == DType::kFloat64;
    const bool is_clean =
        clean.holds_or_empty(tokens.numel, is_wide ? tokens.dtype : DType::kFloat32);
    return is_clean ? nullptr : "clean must be as tokens, in float32 or float64";
  }
};

}  // namespace pixelgen
