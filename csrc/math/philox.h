// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): four words
// that are a pure function of counter and key. Integers only, so that they are the same everywhere.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pixelgen::math {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// What the numbers of one sample share.
struct PhiloxStream {
  uint32_t key0, key1;            // low and high word of the seed
  uint32_t sample, step, stream;  // words 1 to 3 of the counter, word 0 is the group
};

PIXELGEN_INLINE PhiloxStream philox_stream(int64_t seed, int64_t step, int64_t sample,
                                           int64_t stream) {
  return {uint32_t(seed), uint32_t(uint64_t(seed) >> 32), uint32_t(sample), uint32_t(step),
          uint32_t(stream)};
}

// The words of elements 4 group to 4 group + 3.
PIXELGEN_INLINE PhiloxWords philox_words(const PhiloxStream& s, uint32_t group) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t w0 = group, w1 = s.sample, w2 = s.step, w3 = s.stream;
  uint32_t key0 = s.key0, key1 = s.key1;
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10  // straight code, or the loop over groups is not vectorised
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * w0, product1 = kMultiplier1 * w2;
    w0 = uint32_t(product1 >> 32) ^ w1 ^ key0;
    w2 = uint32_t(product0 >> 32) ^ w3 ^ key1;
    w1 = uint32_t(product1);
    w3 = uint32_t(product0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {w0, w1, w2, w3};
}

// In [0, 1): the upper 24 bits, all that fp32 holds.
PIXELGEN_INLINE float philox_uniform(uint32_t word) { return float(word >> 8) * 0x1p-24f; }

}  // namespace pixelgen::math
