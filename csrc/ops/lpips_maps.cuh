// How lpips_distance reads its maps, forward (lpips_fwd.cuh) and backward (lpips_bwd.cuh).
//
// "By position": the positions of a channel are neighbours in memory (NCHW) and a pack holds some
// of them. "By channel": the channels of a position are (channels-last). Maps that allow no packs,
// or two maps of different layouts or dtypes, go one element at a time.
#pragma once

#include "../common/distances.cuh"
#include "../math/distance.h"
#include "lpips_distance.h"

namespace pixelgen::cuda {
namespace {

using math::Divisor;

constexpr int kBlocks = 2;     // of a multiprocessor: 128 registers a thread
constexpr int kPositions = 4;  // of a pack by position
constexpr int kHeld = 8;       // packs of either map in a thread's registers
constexpr int kPart = 16;      // channels that are added up at a time

// Channels of a pack by channel.
template <typename T>
constexpr int kPackOf = 16 / sizeof(T);

// --- any strides and dtypes: a thread per position. Sums are made of parts: hundreds of channels
// one by one would cost digits.

struct Position {
  int64_t b, h, w;

  __device__ __forceinline__ Position(const View<4>& map, int64_t b, int64_t index)
      : b(b), h(index / map.size[3]), w(index - h * map.size[3]) {}
};

// fn(c, pred, target) for the channels [begin, begin + kPart) of a position.
template <typename Fn>
__device__ __forceinline__ void for_part(const LpipsDistance& a, const Position& at, int64_t begin,
                                         Fn fn) {
  const int64_t pred = a.pred.offset(at.b, 0, at.h, at.w);
  const int64_t target = a.target.offset(at.b, 0, at.h, at.w);
  const int64_t end = min(begin + kPart, a.pred.size[1]);
  for (int64_t c = begin; c < end; ++c) {
    fn(c, load_one(a.pred.data, a.pred.dtype, pred + c * a.pred.stride[1], 0.0f),
       load_one(a.target.data, a.target.dtype, target + c * a.target.stride[1], 0.0f));
  }
}

}  // namespace
}  // namespace pixelgen::cuda
