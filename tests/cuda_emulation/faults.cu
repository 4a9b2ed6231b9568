// Small kernels, each right or with one fault: the emulation must see the fault and nothing else.
#include "common/vec.cuh"

namespace pixelgen::cuda {
namespace {

constexpr int kThreads = 96;

enum Fault {
  kNone,
  kMissingBarrier,
  kMissingSecondBarrier,
  kOutOfBounds,
  kBeforeBuffer,
  kMisaligned,
  kUninitialised,
  kExitBeforeBarrier,
  kBarrierInBranch,
  kExitBeforeShuffle,
  kShuffleInBranch,
  kLaneOutsideOfMask,
  kBlocksRace,
  kWarpRace,
  kNumFaults
};

// The block's sum, of which all lanes then hold a copy that is summed again; plus the lane, which
// goes to the mirrored lane and back.
__global__ void __launch_bounds__(kThreads) sum_kernel(float* data, int64_t n, Fault fault) {
  __shared__ float partials[kThreads / kWarpSize];
  __shared__ float row[kThreads];
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const bool is_in = fault == kOutOfBounds ? index <= n : index < n;
  if (fault == kExitBeforeBarrier && warp == 2) return;  // a whole warp

  float value = is_in ? data[fault == kBeforeBuffer ? index - 1 : index] : 0.0f;
  for (int repeat = 0; repeat < 2; ++repeat) {
    if (fault == kExitBeforeShuffle && lane == 31) return;
    if (fault != kShuffleInBranch || lane < 16) value = warp_sum(value);
    if (lane == 0 && !(fault == kUninitialised && warp == 1)) partials[warp] = value;
    if (fault != kMissingBarrier) __syncthreads();
    value = partials[0] + partials[1] + partials[2];
    if (fault == kBarrierInBranch && warp == 0) {
      __syncthreads();
    } else if (fault != kMissingSecondBarrier) {
      __syncthreads();
    }
  }
  row[threadIdx.x] = value + float(lane);
  if (fault != kWarpRace) __syncwarp();
  value = row[warp * kWarpSize + kWarpSize - 1 - lane];
  value = __shfl_sync(0xffffffffu, value, kWarpSize - 1 - lane);
  if (fault == kLaneOutsideOfMask && lane < 16) value = __shfl_sync(0xffffu, value, lane + 1);
  if (is_in) data[index] = value;
  if (fault == kBlocksRace && threadIdx.x == 0) data[n - 1] = 0.0f;
}

__global__ void pack_kernel(float* data, int offset) {
  Pack<float, 4>* packs = reinterpret_cast<Pack<float, 4>*>(data + offset);
  const Pack<float, 4> pack = packs[threadIdx.x];
  packs[threadIdx.x] = pack;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Status run_fault(float* data, int64_t n,
                                                                   int fault) {
  if (fault == kMisaligned) return launch(pack_kernel, 1, 2, Place{}, data, 1);
  const Status status = launch(pack_kernel, 1, 2, Place{}, data, 4);
  if (status != nullptr) return status;
  const unsigned blocks = unsigned(ceil_div(n, kThreads));
  return launch(sum_kernel, blocks, kThreads, Place{}, data, n, Fault(fault));
}

}  // namespace pixelgen::cuda
