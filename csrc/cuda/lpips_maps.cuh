// How lpips_distance reads its maps, forward (lpips_fwd.cuh) and backward (lpips_bwd.cuh).
//
// "By position": the positions of a channel are neighbours in memory (NCHW) and a pack holds some
// of them. "By channel": the channels of a position are (channels-last). Maps that allow no packs,
// or two maps of different layouts or dtypes, go one element at a time.
#pragma once

#include "../lpips_distance.h"
#include "../math/distance.h"
#include "distances.cuh"
#include "vec.cuh"

namespace pixelgen::cuda {
namespace {

using math::Divisor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocks = 2;     // of a multiprocessor: 128 registers a thread
constexpr int kPositions = 4;  // of a pack by position
constexpr int kHeld = 8;       // packs of either map in a thread's registers
constexpr int kPart = 16;      // channels that are added up at a time

// Channels of a pack by channel.
template <typename T>
constexpr int kPackOf = 16 / sizeof(T);

// --- any strides and dtypes: a thread per position. Sums are made of parts: hundreds of channels
// one by one would cost digits.

struct Place {
  int64_t pred, target, grad;  // offsets of channel 0
};

__device__ __forceinline__ Place place_of(const LpipsDistanceParams& p, int64_t b,
                                          int64_t position) {
  const int64_t h = position / p.W, w = position - h * p.W;
  return {b * p.pred_stride_b + h * p.pred_stride_h + w * p.pred_stride_w,
          b * p.target_stride_b + h * p.target_stride_h + w * p.target_stride_w, 0};
}

// fn(c, pred, target) for the channels [begin, begin + kPart) of a position.
template <typename Fn>
__device__ __forceinline__ void for_part(const LpipsDistanceParams& p, const Place& place,
                                         int64_t begin, Fn fn) {
  const int64_t end = min(begin + kPart, p.C);
  for (int64_t c = begin; c < end; ++c) {
    fn(c, load_one(p.pred, p.pred_dtype, place.pred + c * p.pred_stride_c, 0.0f),
       load_one(p.target, p.target_dtype, place.target + c * p.target_stride_c, 0.0f));
  }
}

}  // namespace
}  // namespace pixelgen::cuda
