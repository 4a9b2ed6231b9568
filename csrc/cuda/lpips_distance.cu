// Bound by bytes: pred and target are read once (backward: and grad_pred written once). Here is
// what decides how; the kernels are in lpips_fwd.cuh and lpips_bwd.cuh.
#include "../lpips_distance.h"
#include "lpips_bwd.cuh"
#include "lpips_fwd.cuh"

namespace pixelgen::cuda {
namespace {

// Both in one dtype, their positions in one row: what packs need.
bool may_be_packed(const LpipsDistanceParams& p) {
  return p.H == 1 && p.pred_dtype == p.target_dtype;
}

bool is_by_position(const LpipsDistanceParams& p, int N) {
  return may_be_packed(p) && p.pred_stride_w == 1 && p.target_stride_w == 1 && p.W % N == 0 &&
         p.positions_per_chunk % N == 0 &&
         packs_are_aligned(p.pred, p.pred_dtype, N, p.pred_stride_b, p.pred_stride_c) &&
         packs_are_aligned(p.target, p.target_dtype, N, p.target_stride_b, p.target_stride_c) &&
         packs_are_aligned(p.statistics, DType::kFloat32, 4, p.W, 0);
}

bool is_by_channel(const LpipsDistanceParams& p, int N) {
  return may_be_packed(p) && p.pred_stride_c == 1 && p.target_stride_c == 1 && p.C % N == 0 &&
         packs_are_aligned(p.pred, p.pred_dtype, N, p.pred_stride_b, p.pred_stride_w) &&
         packs_are_aligned(p.target, p.target_dtype, N, p.target_stride_b, p.target_stride_w);
}

// The smallest power of two that is not below `count`, within these limits.
int power_of_two(int64_t count, int least, int limit) {
  int power = least;
  while (power < count && power < limit) power *= 2;
  return power;
}

template <typename T>
Status launch_chunks(const LpipsDistanceParams& p, int64_t chunks, cudaStream_t stream) {
  const unsigned grid = unsigned(p.B * chunks);
  int lanes = kWarpSize;
  if (is_by_position(p, kPositions) && p.C <= kMostChannels) {
    while (kThreads / lanes * kHeld < p.C) lanes /= 2;
    return launch(by_position_kernel<T>, grid, kThreads, stream, p, chunks, lanes);
  }
  const int64_t packs = p.C / kPackOf<T>;  // of a position
  if (is_by_channel(p, kPackOf<T>) && packs <= kMostPacks * kWarpSize) {
    lanes = power_of_two(packs, kFewestLanes, kWarpSize);
    const auto kernel = packs <= kWarpSize       ? by_channel_kernel<T, 1>
                        : packs <= 2 * kWarpSize ? by_channel_kernel<T, 2>
                                                 : by_channel_kernel<T, kMostPacks>;
    return launch(kernel, grid, kThreads, stream, p, chunks, lanes);
  }
  return launch(any_layout_kernel, grid, kThreads, stream, p, chunks);
}

template <typename T>
Status launch_grads(const LpipsDistanceGradParams& g, cudaStream_t stream) {
  const LpipsDistanceParams& p = g.forward;
  const auto grad_is_aligned = [&](int N, int64_t stride) {
    return packs_are_aligned(g.grad_pred, p.pred_dtype, N, g.grad_pred_stride_b, stride);
  };
  if (is_by_position(p, kPositions) && g.grad_pred_stride_w == 1 &&
      grad_is_aligned(kPositions, g.grad_pred_stride_c)) {
    const int64_t tiles = ceil_div(p.W, kWarpSize * kPositions);
    const int64_t parts = ceil_div(p.C, kChannelsOfBlock);
    if (p.B * tiles * parts > kMaxBlocks) return "more positions than a grid holds";
    return launch(grads_by_position_kernel<T>, unsigned(p.B * tiles * parts), kThreads, stream, g,
                  tiles, parts);
  }
  if (is_by_channel(p, kPackOf<T>) && g.grad_pred_stride_c == 1 &&
      grad_is_aligned(kPackOf<T>, g.grad_pred_stride_w)) {
    const int lanes = power_of_two(p.C / kPackOf<T>, 1, kThreads);
    const int64_t tiles = ceil_div(p.W, kThreads / lanes * kHeld);
    if (p.B * tiles > kMaxBlocks) return "more positions than a grid holds";
    return launch(grads_by_channel_kernel<T>, unsigned(p.B * tiles), kThreads, stream, g, tiles,
                  lanes);
  }
  const int64_t tiles = ceil_div(p.H * p.W, kThreads);
  if (p.B * tiles > kMaxBlocks) return "more positions than a grid holds";
  return launch(grads_of_any_layout_kernel, unsigned(p.B * tiles), kThreads, stream, g, tiles);
}

Status check_dtypes(const LpipsDistanceParams& p) {
  const bool is_double = p.pred_dtype == DType::kFloat64 || p.target_dtype == DType::kFloat64;
  return is_double ? "pred and target must be fp32, bf16 or fp16" : nullptr;
}

}  // namespace

Status lpips_distance_fwd(const LpipsDistanceParams& p, void* stream) {
  if (p.B == 0) return nullptr;  // no blocks would be an error
  Status status = check_dtypes(p);
  if (status != nullptr) return status;
  const int64_t chunks = ceil_div(p.H * p.W, p.positions_per_chunk);
  if (p.B * chunks > kMaxBlocks) return "more chunks of positions than a grid holds";
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.pred_dtype) {
    case DType::kFloat32:
      status = launch_chunks<float>(p, chunks, cuda_stream);
      break;
    case DType::kBFloat16:
      status = launch_chunks<__nv_bfloat16>(p, chunks, cuda_stream);
      break;
    default:
      status = launch_chunks<__half>(p, chunks, cuda_stream);
  }
  if (status != nullptr) return status;
  return launch_chunk_means(p.partials, p.distance, p.B, chunks, p.H * p.W, cuda_stream);
}

Status lpips_distance_bwd(const LpipsDistanceGradParams& g, void* stream) {
  const LpipsDistanceParams& p = g.forward;
  if (p.B == 0) return nullptr;
  const Status status = check_dtypes(p);
  if (status != nullptr) return status;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.pred_dtype) {
    case DType::kFloat32:
      return launch_grads<float>(g, cuda_stream);
    case DType::kBFloat16:
      return launch_grads<__nv_bfloat16>(g, cuda_stream);
    default:
      return launch_grads<__half>(g, cuda_stream);
  }
}

}  // namespace pixelgen::cuda
