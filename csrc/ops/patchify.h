// tokens[b, (h / P) * (W / P) + w / P, offset(c, h % P, w % P)] = x[b, c, h, w], and the way back.
// offset(c, row, col) = (c * P + row) * P + col (channel first) or (row * P + col) * C + c (last).
#pragma once

#include "../common/op.h"

namespace pixelgen {

enum class ChannelOrder { kFirst, kLast };
PIXELGEN_WORDS(ChannelOrder, "first", "last")

constexpr int64_t kMaxPatchSize = 1 << 15;

struct Patchify {
  Tensor<4> x;       // (B, C, H, W)
  Tensor<3> tokens;  // (B, H / P * W / P, C * P * P)
  int64_t patch_size, height, width;
  ChannelOrder channel_order;

  PIXELGEN_MEMBER Status problem() const {
    const int64_t P = patch_size;
    if (x.size[2] != height || x.size[3] != width) return "x must have this height and width";
    if (P < 1 || P > kMaxPatchSize || height % P != 0 || width % P != 0)
      return "patch_size must divide height and width";
    if (!tokens.fits(x.size[0], height / P * (width / P), x.size[1] * P * P))
      return "tokens must have a row per patch of x";
    return tokens.dtype == x.dtype ? nullptr : "tokens must have the dtype of x";
  }
};

struct PatchifyFwd : Patchify {
  PIXELGEN_ARGUMENTS(x, tokens, patch_size, height, width, channel_order)
};

struct UnpatchifyFwd : Patchify {
  PIXELGEN_ARGUMENTS(tokens, x, patch_size, height, width, channel_order)
};

}  // namespace pixelgen
