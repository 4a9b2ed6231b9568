// Random numbers of one sample, as rows of fp32: 4 numbers for each group from `first_group` on.
#pragma once

#include "../math/normal.h"
#include "rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

inline void fill_uniform(const math::PhiloxStream& stream, int64_t first_group, int64_t num_groups,
                         float* out) {
#pragma omp simd
  for (int64_t g = 0; g < num_groups; ++g) {
    const math::PhiloxWords words = math::philox_words(stream, uint32_t(first_group + g));
    out[4 * g] = math::philox_uniform(words.w0);
    out[4 * g + 1] = math::philox_uniform(words.w1);
    out[4 * g + 2] = math::philox_uniform(words.w2);
    out[4 * g + 3] = math::philox_uniform(words.w3);
  }
}

inline void fill_normal(const math::PhiloxStream& stream, int64_t first_group, int64_t num_groups,
                        float* out) {
#pragma omp simd
  for (int64_t g = 0; g < num_groups; ++g) {
    const math::NormalGroup normal = math::philox_normal(stream, uint32_t(first_group + g));
    out[4 * g] = normal.low.first;
    out[4 * g + 1] = normal.low.second;
    out[4 * g + 2] = normal.high.first;
    out[4 * g + 3] = normal.high.second;
  }
}

}  // namespace
}  // namespace pixelgen::cpu::PIXELGEN_ISA
