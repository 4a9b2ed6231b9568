// Bound by arithmetic: ten rounds of Philox for four numbers, vectorised over groups of four. One
// work item is a block of one sample's groups.
#include "../philox.h"

#include <cstring>

#include "philox_rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kGroups = 256;  // per work item: 4 KB of numbers

template <bool kNormal>
Status fill(const PhiloxParams& p, int num_threads) {
  const int64_t blocks = ceil_div(p.count, 4 * kGroups);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < p.B * blocks; ++item) {
    const int64_t b = item / blocks, first_group = item % blocks * kGroups;
    const int64_t sample = static_cast<const int64_t*>(p.sample_index)[b * p.sample_index_stride];
    const math::PhiloxStream stream = math::philox_stream(p.seed, p.step, sample, p.stream_index);
    alignas(64) float values[4 * kGroups];
    const int64_t n = min_of(4 * kGroups, p.count - 4 * first_group);
    if (kNormal)
      fill_normal(stream, first_group, ceil_div(n, 4), values);
    else
      fill_uniform(stream, first_group, ceil_div(n, 4), values);
    std::memcpy(static_cast<float*>(p.out) + b * p.count + 4 * first_group, values,
                n * sizeof(float));
  }
  return nullptr;
}

}  // namespace

Status philox_uniform(const PhiloxParams& p, int num_threads) {
  return fill<false>(p, num_threads);
}
Status philox_normal(const PhiloxParams& p, int num_threads) { return fill<true>(p, num_threads); }

}  // namespace pixelgen::cpu::PIXELGEN_ISA
