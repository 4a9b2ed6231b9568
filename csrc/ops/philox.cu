// Bound by arithmetic: ten rounds of Philox for four numbers. One thread draws one group of four
// and stores it as 16 bytes.
// The same bits as on the CPU: nothing is contracted.
// flags: -fmad=false
#include "../common/vec.cuh"
#include "../math/normal.h"
#include "philox.h"

namespace pixelgen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 4;

template <bool kNormal>
__global__ void __launch_bounds__(kThreads)
    philox_kernel(const Philox p, int64_t first_block, int64_t blocks_per_sample) {
  const int64_t block = first_block + blockIdx.x;
  const int64_t b = block / blocks_per_sample;
  const int64_t group = block % blocks_per_sample * kThreads + threadIdx.x;
  if (group * kGroup >= p.count) return;
  const math::PhiloxStream stream = p.stream_of(b);
  float values[kGroup];
  if constexpr (kNormal) {
    const math::NormalGroup normal = math::philox_normal(stream, uint32_t(group));
    values[0] = normal.low.first;
    values[1] = normal.low.second;
    values[2] = normal.high.first;
    values[3] = normal.high.second;
  } else {
    const math::PhiloxWords words = math::philox_words(stream, uint32_t(group));
    values[0] = math::philox_uniform(words.w0);
    values[1] = math::philox_uniform(words.w1);
    values[2] = math::philox_uniform(words.w2);
    values[3] = math::philox_uniform(words.w3);
  }
  float* out = p.out.as<float>() + b * p.count + group * kGroup;
  if (p.count % kGroup == 0) {  // the same for all threads
    store<kGroup, true>(values, out, kGroup);
  } else {
    const int64_t left = p.count - group * kGroup;
    store<kGroup, false>(values, out, left < kGroup ? int(left) : kGroup);
  }
}

template <bool kNormal>
Status fill(const Philox& p, const Place& place) {
  if (const Status status = p.problem()) return status;
  const int64_t blocks_per_sample = ceil_div(p.count, kThreads * kGroup);
  const int64_t blocks = p.sample_index.size[0] * blocks_per_sample;
  // one launch unless there are more than 2^31 blocks
  for (int64_t first = 0; first < blocks; first += kMaxBlocks) {
    const int64_t left = blocks - first;
    const Status status =
        launch(philox_kernel<kNormal>, unsigned(left < kMaxBlocks ? left : kMaxBlocks), kThreads,
               place, p, first, blocks_per_sample);
    if (status != nullptr) return status;
  }
  return nullptr;
}

}  // namespace

Status philox_uniform_fwd(const Philox& p, const Place& place) { return fill<false>(p, place); }
Status philox_normal_fwd(const Philox& p, const Place& place) { return fill<true>(p, place); }

PIXELGEN_OPS(philox, PIXELGEN_OP(philox_uniform_fwd), PIXELGEN_OP(philox_normal_fwd))

}  // namespace pixelgen::cuda
