// Numbers that are a pure function of (seed, step, sample index, stream, element): math/philox.h
// and math/normal.h. Element i is word i % 4 of group i / 4 (normal: a pair of words gives a pair).
#pragma once

#include "common.h"

namespace pixelgen {

struct PhiloxParams {
  const void* sample_index;  // (B,) int64
  void* out;                 // (B, count) fp32, dense
  int64_t B, count, sample_index_stride;
  int64_t seed, step, stream_index;  // the seed in full, of the others the low 32 bits
};

namespace cpu {
Status philox_uniform(const PhiloxParams& p, int num_threads);
Status philox_normal(const PhiloxParams& p, int num_threads);
}  // namespace cpu

// Enqueue on `stream`. Never allocate, never synchronise.
namespace cuda {
Status philox_uniform(const PhiloxParams& p, void* stream);
Status philox_normal(const PhiloxParams& p, void* stream);
}  // namespace cuda

}  // namespace pixelgen
