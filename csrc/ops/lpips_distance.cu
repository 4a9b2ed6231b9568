// Bound by bytes: pred and target are read once (backward: and grad_pred written once). Here is
// what decides how; the kernels are in lpips_fwd.cuh and lpips_bwd.cuh.
#include "lpips_bwd.cuh"
#include "lpips_distance.h"
#include "lpips_fwd.cuh"

namespace pixelgen::cuda {
namespace {

int64_t chunk_length(const LpipsDistance& a) {
  constexpr int64_t kElements = 16384;  // what fills an even share of the multiprocessors
  return positions_of_chunk(kElements, a.pred.size[1]);
}

// Whether packs of N of both maps may be read, along dimension `inner` at any index of `outer`:
// they need one dtype, and their positions in one row.
bool are_packed(const LpipsDistance& a, int N, int inner, int outer) {
  return a.pred.size[2] == 1 && a.pred.dtype == a.target.dtype &&
         has_packs(a.pred, N, inner, 0, outer) && has_packs(a.target, N, inner, 0, outer);
}

bool is_by_position(const LpipsDistance& a, int N) {
  return are_packed(a, N, 3, 1) && chunk_length(a) % N == 0 &&
         packs_are_aligned(a.statistics.data, DType::kFloat32, 4, a.size(), 0);
}

bool is_by_channel(const LpipsDistance& a, int N) { return are_packed(a, N, 1, 3); }

// The smallest power of two that is not below `count`, within these limits.
int power_of_two(int64_t count, int least, int limit) {
  int power = least;
  while (power < count && power < limit) power *= 2;
  return power;
}

template <typename T>
Status launch_chunks(const LpipsDistanceFwd& a, const Chunks& chunks, const Place& place) {
  const int64_t C = a.pred.size[1], packs = C / kPackOf<T>;  // of a position
  int lanes = kWarpSize;
  if (is_by_position(a, kPositions) && C <= kMostChannels) {
    while (kThreads / lanes * kHeld < C) lanes /= 2;
    return launch(by_position_kernel<T>, chunks.blocks, kThreads, place, a, chunks, lanes);
  }
  if (is_by_channel(a, kPackOf<T>) && packs <= kMostPacks * kWarpSize) {
    lanes = power_of_two(packs, kFewestLanes, kWarpSize);
    const auto kernel = packs <= kWarpSize       ? by_channel_kernel<T, 1>
                        : packs <= 2 * kWarpSize ? by_channel_kernel<T, 2>
                                                 : by_channel_kernel<T, kMostPacks>;
    return launch(kernel, chunks.blocks, kThreads, place, a, chunks, lanes);
  }
  return launch(any_layout_kernel, chunks.blocks, kThreads, place, a, chunks);
}

template <typename T>
Status launch_grads(const LpipsDistanceBwd& g, const Place& place) {
  const int64_t B = g.pred.size[0], C = g.pred.size[1];
  // fn(blocks) with a block for each of `count` parts of every sample
  const auto with_blocks = [&](int64_t count, auto fn) -> Status {
    if (B * count == 0) return nullptr;  // no blocks would be an error
    if (B * count > kMaxBlocks) return "more positions than a grid holds";
    return fn(unsigned(B * count));
  };
  if (is_by_position(g, kPositions) && has_packs(g.grad_pred, kPositions, 3, 0, 1)) {
    const int64_t tiles = ceil_div(g.size(), kWarpSize * kPositions);
    const int64_t parts = ceil_div(C, kChannelsOfBlock);
    return with_blocks(tiles * parts, [&](unsigned blocks) {
      return launch(grads_by_position_kernel<T>, blocks, kThreads, place, g, tiles, parts);
    });
  }
  if (is_by_channel(g, kPackOf<T>) && has_packs(g.grad_pred, kPackOf<T>, 1, 0, 3)) {
    const int lanes = power_of_two(C / kPackOf<T>, 1, kThreads);
    const int64_t tiles = ceil_div(g.size(), kThreads / lanes * kHeld);
    return with_blocks(tiles, [&](unsigned blocks) {
      return launch(grads_by_channel_kernel<T>, blocks, kThreads, place, g, tiles, lanes);
    });
  }
  const int64_t tiles = ceil_div(g.size(), kThreads);
  return with_blocks(tiles, [&](unsigned blocks) {
    return launch(grads_of_any_layout_kernel, blocks, kThreads, place, g, tiles);
  });
}

}  // namespace

Status lpips_distance_fwd(const LpipsDistanceFwd& given, const Place& place) {
  return checked(given, given.pred.dtype, [&](auto element) {
    LpipsDistanceFwd a = given;
    join_positions(a.pred, a.target);
    return chunk_means(
        a.distance, a.pred.size[0], a.size(), chunk_length(a), place,
        [&](const Chunks& chunks) { return launch_chunks<decltype(element)>(a, chunks, place); });
  });
}

Status lpips_distance_bwd(const LpipsDistanceBwd& given, const Place& place) {
  return checked(given, given.pred.dtype, [&](auto element) {
    LpipsDistanceBwd g = given;
    join_positions(g.pred, g.target, g.grad_pred);
    return launch_grads<decltype(element)>(g, place);
  });
}

PIXELGEN_OPS(lpips_distance, PIXELGEN_OP(lpips_distance_fwd), PIXELGEN_OP(lpips_distance_bwd))

}  // namespace pixelgen::cuda
