// Numbers that are a pure function of (seed, step, sample index, stream, element): math/philox.h
// and math/normal.h. Element i is word i % 4 of group i / 4 (normal: a pair of words gives a pair).
#pragma once

#include "../common/op.h"
#include "../math/philox.h"

namespace pixelgen {

struct Philox {
  Indices sample_index;               // (B,)
  Dense out;                          // (B, count) fp32
  int64_t seed, step, count, stream;  // the seed in full, of step and stream the low 32 bits
  PIXELGEN_ARGUMENTS(sample_index, out, seed, step, count, stream)

  PIXELGEN_MEMBER math::PhiloxStream stream_of(int64_t b) const {
    const int64_t sample = sample_index.as<const int64_t>()[sample_index.offset(b)];
    return math::philox_stream(seed, step, sample, stream);
  }
  PIXELGEN_MEMBER Status problem() const {
    // as a quotient: the product of wrong numbers may not fit
    const int64_t B = sample_index.size[0], held = B > 0 ? out.numel / B : 0;
    const bool is_right = held == count && out.holds(B * held, DType::kFloat32);
    return is_right ? nullptr : "out must be float32 of shape (B, count)";
  }
};

}  // namespace pixelgen
