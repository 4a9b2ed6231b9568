// Bound by arithmetic: ten rounds of Philox for four numbers, vectorised over groups of four. One
// work item is a block of one sample's groups.
// The same bits everywhere: no sum is reordered or contracted.
// flags: -fno-associative-math -ffp-contract=off
#include "philox.h"

#include <cstring>

#include "../common/philox_rows.h"

namespace pixelgen::cpu::PIXELGEN_ISA {
namespace {

constexpr int64_t kGroups = 256;  // per work item: 4 KB of numbers

template <bool kNormal>
Status fill(const Philox& p, int num_threads) {
  if (const Status status = p.problem()) return status;
  const int64_t blocks = ceil_div(p.count, 4 * kGroups);
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t item = 0; item < p.sample_index.size[0] * blocks; ++item) {
    const int64_t b = item / blocks, first_group = item % blocks * kGroups;
    const math::PhiloxStream stream = p.stream_of(b);
    alignas(64) float values[4 * kGroups];
    const int64_t n = min_of(4 * kGroups, p.count - 4 * first_group);
    if (kNormal)
      fill_normal(stream, first_group, ceil_div(n, 4), values);
    else
      fill_uniform(stream, first_group, ceil_div(n, 4), values);
    std::memcpy(p.out.as<float>() + b * p.count + 4 * first_group, values, n * sizeof(float));
  }
  return nullptr;
}

}  // namespace

Status philox_uniform_fwd(const Philox& p, const Place& place) {
  return fill<false>(p, place.num_threads);
}
Status philox_normal_fwd(const Philox& p, const Place& place) {
  return fill<true>(p, place.num_threads);
}

PIXELGEN_OPS(philox, PIXELGEN_OP(philox_uniform_fwd), PIXELGEN_OP(philox_normal_fwd))

}  // namespace pixelgen::cpu::PIXELGEN_ISA
